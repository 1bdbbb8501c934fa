"""Starts one process per device and ends them together.

torchrun does the first of these too, but answers a wrong setting with a page of traceback and exit code 1, and takes
minutes to notice a process that hangs. Here the first process that fails speaks for the run: its message is printed
once, its exit code is the run's. Runs under torchrun or `accelerate launch` work as well: they set RANK themselves, and
nothing is started then. Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from simpletuner.distributed.frozen import is_frozen
from simpletuner.distributed.lifeline import LAST_WORDS, LIFELINE, LISTENER, SAVING_SECONDS, lifeline
from simpletuner.errors import EXITS_OF_SIGNALS

# A process that hangs in a collective does not answer SIGTERM; it has nothing to save either.
GRACE_SECONDS = 20.0
POLL_SECONDS = 0.1
# What says which of several processes one is: set by this module, torchrun and accelerate.
OF_ONE_PROCESS = frozenset(
    (
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
        *(LAST_WORDS, LIFELINE, LISTENER),
    )
)


@dataclass(frozen=True)
class Layout:
    """The processes to start on this machine.

    Args:
        num_processes: here.
        num_machines: all with the same number.
        machine_rank: 0 is the machine whose address the others know.
        address: of machine 0.
        port: on it; None chooses a free one, which only a single machine can do.
    """

    num_processes: int
    num_machines: int = 1
    machine_rank: int = 0
    address: str = "127.0.0.1"
    port: int | None = None

    @property
    def world_size(self) -> int:
        return self.num_processes * self.num_machines


def is_started_already(environment: Mapping[str, str]) -> bool:
    """Whether this is one of several processes: torchrun, accelerate or this module has started it.

    Each of them says which process of its machine it is. RANK and WORLD_SIZE alone may be numbers of machines: shells
    of clusters export them so.
    """
    is_numbered = "LOCAL_RANK" in environment or "TORCHELASTIC_RUN_ID" in environment
    return is_numbered and "RANK" in environment and "WORLD_SIZE" in environment


def forget_machine_numbers(environment: MutableMapping[str, str]) -> None:
    """Remove RANK and WORLD_SIZE where they are not those of a process."""
    if not is_started_already(environment):
        for name in ("RANK", "WORLD_SIZE"):
            environment.pop(name, None)


def is_main(environment: Mapping[str, str]) -> bool:
    """Whether this is the process that speaks for all, or the only one."""
    return environment.get("RANK", "0") == "0"


def environment_outside(environment: Mapping[str, str]) -> dict[str, str]:
    """For a program that a process of a run starts: it is none of the processes, and must not join them."""
    return {name: value for name, value in environment.items() if name not in OF_ONE_PROCESS}


def launch(arguments: Sequence[str], layout: Layout, say: Callable[[str], None]) -> int:
    """Run `simpletuner ARGUMENTS` in each process until all have ended; returns the exit code of the run.

    Args:
        say: called with the last lines of the process that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="simpletuner-") as folder, lifeline() as end:
        listener = listen() if layout.port is None else None
        port = layout.port or listener.getsockname()[1]  # type: ignore[union-attr]
        processes = [
            _start(arguments, layout, local_rank, port, Path(folder), end, listener)
            for local_rank in range(layout.num_processes)
        ]
        if listener is not None:
            listener.close()  # the main process has its own
        with _forwarded_signals(processes) as received:
            failed = _wait(processes, received, say)
        if failed is None:
            return 0
        returncode = processes[failed].returncode
        # Processes that leave on a signal say the same; the first is the one that a reader looks for. Of those that
        # were killed the one that failed is the cause: others did not leave in time.
        speaker = next(index for index, process in enumerate(processes) if process.returncode == returncode)
        words = Path(folder) / str(failed if returncode == 1 or returncode < 0 else speaker)
        if words.is_file():
            say(words.read_text(encoding="utf-8"))
        elif not received:
            say(_silent_end(returncode, _rank(layout, failed), layout.world_size))
        return _exit_code(returncode)


def _rank(layout: Layout, local_rank: int) -> int:
    return layout.machine_rank * layout.num_processes + local_rank


def _start(
    arguments: Sequence[str],
    layout: Layout,
    local_rank: int,
    port: int,
    folder: Path,
    end: int,
    listener: socket.socket | None = None,
) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(_rank(layout, local_rank)),
        "WORLD_SIZE": str(layout.world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(layout.num_processes),
        "MASTER_ADDR": layout.address,
        "MASTER_PORT": str(port),
        # As torchrun does: every process would else take all cores for itself.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        LAST_WORDS: str(folder / str(local_rank)),
        LIFELINE: str(end),
    }
    # A session of its own: Ctrl-C in the terminal reaches the launcher only, which tells each process once.
    # -P: a torch.py in the working folder is no torch.
    command = [sys.executable, "-P", "-m", "simpletuner", *arguments]
    descriptors = [end]
    if listener is not None and local_rank == 0:
        environment[LISTENER] = str(listener.fileno())
        descriptors.append(listener.fileno())
    return subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=tuple(descriptors))


def _wait(processes: Sequence[subprocess.Popen[bytes]], asked: Sequence[int], say: Callable[[str], None]) -> int | None:
    """Until all have ended; the first that failed, or None. What runs on after that is asked to end, and made to.

    Args:
        asked: the signals that came so far.
        say: called where a process does not do what it was asked.
    """
    failed: int | None = None
    deadline = float("inf")
    while running := [process for process in processes if process.poll() is None]:
        if failed is None and (failed := _first_failure(processes)) is not None:
            _signal_all(processes, signal.SIGTERM)
        if failed is not None or asked:
            # Who is stopped saves nothing, however long it is waited for; who still answers leaves by itself.
            frozen = [process for process in running if is_frozen(process.pid)]
            if failed is not None:
                _signal_all(frozen, signal.SIGKILL)
            elif len(frozen) == len(running):
                deadline = 0.0
        code = None if failed is None else processes[failed].returncode
        deadline = min(deadline, time.monotonic() + _patience(code, len(asked)))
        if time.monotonic() > deadline:
            _signal_all(processes, signal.SIGKILL)
            if failed is None:
                say(
                    "the processes do not answer: they were killed; the same command continues from the last checkpoint"
                )
            deadline = float("inf")
        time.sleep(POLL_SECONDS)
    return failed if failed is not None else _first_failure(processes)


def _patience(code: int | None, times_asked: int) -> float:
    """Seconds until what still runs is killed.

    Args:
        code: of the process that ended first, None while none has.
    """
    is_leaving = code is None or code in EXITS_OF_SIGNALS
    if not is_leaving or times_asked > 1:
        return GRACE_SECONDS
    return SAVING_SECONDS if code is not None or times_asked else float("inf")


def _first_failure(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    failures = [index for index, process in enumerate(processes) if process.poll() not in (None, 0)]
    # Those that end because another one did come later, or at once by a lost connection; one that a signal ended, or
    # that had a reason of its own, is the cause.
    return min(failures, key=lambda index: (processes[index].returncode == 1, index), default=None)


def _signal_all(processes: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


@contextmanager
def _forwarded_signals(processes: Sequence[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """SIGTERM, SIGINT and SIGHUP go on to every process, which save and leave; inside, the list of those that came.

    SIGUSR1 goes on too: each process prints where it is, which tells why a run hangs.
    """
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        _signal_all(processes, signal.Signals(number))

    def ask(number: int, frame: FrameType | None) -> None:
        _signal_all(processes, signal.Signals(number))

    forwarded = [signal.SIGTERM, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup, which the processes inherit
        forwarded.append(signal.SIGHUP)
    previous = {number: signal.signal(number, forward) for number in forwarded}
    previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, ask)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _exit_code(returncode: int) -> int:
    """A shell's code for a process that a signal ended."""
    return 128 - returncode if returncode < 0 else returncode


def _silent_end(returncode: int, rank: int, size: int) -> str:
    who = f"process {rank} of {size}"
    if returncode == -signal.SIGKILL:
        return f"{who} was killed (SIGKILL): most often the machine had no memory left; the others were ended"
    if returncode < 0:
        return f"{who} was ended by {signal.Signals(-returncode).name}; the others were ended"
    return f"{who} ended with code {returncode}; the others were ended"


def leave_last_words(text: str, environment: Mapping[str, str]) -> bool:
    """Keep an error for the launcher, which prints that of the first process that failed; False without a launcher."""
    path = environment.get(LAST_WORDS)
    if not path:
        return False
    rank, size = environment["RANK"], environment["WORLD_SIZE"]
    prefix = "" if rank == "0" else f"process {rank} of {size}: "
    with contextlib.suppress(OSError):  # the launcher is gone, and with it the folder: then it is printed here
        Path(path).write_text(prefix + text, encoding="utf-8")
        return True
    return False


def listen() -> socket.socket:
    """A socket on a free port of this machine, which the main process takes over.

    It listens from the start: a free port that is only remembered may be taken by another program until the main
    process uses it, also by one of its own peers, whose connection to a port that nobody listens on yet can get that
    very port as its own end and then meets itself.
    """
    return socket.create_server(("127.0.0.1", 0), backlog=1024)
