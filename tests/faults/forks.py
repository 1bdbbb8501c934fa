"""The real command in forked processes: torch is imported once, so that a start or a kill costs milliseconds.

`disk.c` is loaded into each of them. It sees the operations that change files of the run, and can kill the process or
refuse at one of them.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import simpletuner

HERE = Path(__file__).parent
SECONDS = 300
HUNG = -1000
# An exit code comes through a pipe and can be read once. A start reads those of all processes that have ended.
_EXIT_CODES = threading.Lock()
_LEFT_OVER = re.compile(r"\.(?:tmp|trash|aside)-[\w.-]+?(?=/|$)|\.tmp\w{6}(?=$)")


@dataclass(frozen=True)
class Operation:
    """An operation that changed a file.

    Args:
        number: in the order of the recorded run, from 1.
        call: `write`, `rename`, ...
        path: relative to the folder of the run.
        where: `file:line` of the innermost calls in the package, innermost first.
        repeat: how many operations of the same site came before it. Threads and the age of files decide how many
            operations come before one, so its number does not name it in another run; site and repeat do.
    """

    number: int
    call: str
    path: str
    where: tuple[str, ...]
    repeat: int

    @property
    def site(self) -> tuple[str, ...]:
        """What is the same for another step, another image, another temporary or drawn name."""
        kind = re.sub(r"[0-9a-f]{8,}|\d+", "#", _LEFT_OVER.sub("TMP", self.path))
        return (self.call, kind, *self.where)


@dataclass(frozen=True)
class Fault:
    """What happens at one operation.

    Args:
        error: errno; 0 kills the process.
        persists: all later operations fail too.
    """

    at: Operation
    error: int = 0
    persists: bool = False


@cache
def library() -> Path:
    """`disk.c`, compiled."""
    built = Path(tempfile.mkdtemp(prefix="faults-")) / "disk.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", built, HERE / "disk.c", "-ldl"], check=True)
    return built


@cache
def server() -> multiprocessing.context.ForkServerContext:
    """Forks processes in which torch is imported and `disk.c` is loaded."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.warm"])
    set_for_it = {"LD_PRELOAD": str(library()), "PYTHONPATH": str(HERE.parent.parent)}
    before = {name: os.environ.get(name) for name in set_for_it}
    os.environ.update(set_for_it)
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
    return context


def start(
    folder: Path,
    arguments: Sequence[str] = ("train",),
    fault: Fault | None = None,
    record: Path | None = None,
    variables: Mapping[str, str] | None = None,
    before: Callable[[], None] | None = None,
) -> multiprocessing.process.BaseProcess:
    """`simpletuner ARGUMENTS` in `folder`; what it prints goes to a file beside the folder.

    Args:
        record: gets one line of JSON for each operation.
        variables: of the environment, on top of this process's.
        before: called in the process first.
    """
    words = (folder, list(arguments), fault, record, dict(variables or {}), before)
    with _EXIT_CODES:
        process = server().Process(target=_command, args=words)
        process.start()
    return process


def run(folder: Path, fault: Fault | None = None, record: Path | None = None) -> int:
    """Train in `folder` to the end; the exit code, minus the signal, or `HUNG`."""
    process = start(folder, fault=fault, record=record)
    multiprocessing.connection.wait([process.sentinel], SECONDS)
    with _EXIT_CODES:
        if process.is_alive():
            process.kill()
            process.join()
            return HUNG
        assert process.exitcode is not None
        return process.exitcode


def terminal(folder: Path) -> str:
    """What the last command of `folder` printed."""
    return _terminal_file(folder).read_text(errors="replace")


def operations(record: Path) -> list[Operation]:
    """What a recorded run did, in order."""
    rows = (json.loads(line) for line in record.read_text().splitlines())
    return [Operation(number, call, path, tuple(where), repeat) for number, call, path, where, repeat in rows]


def was_met(folder: Path) -> bool:
    """Whether the last command of `folder` that was to meet a fault came to that operation."""
    return _met_file(folder).exists()


def _met_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".met")


def _terminal_file(folder: Path) -> Path:
    return folder.with_name(folder.name + ".terminal")


def _command(
    folder: Path,
    arguments: list[str],
    fault: Fault | None,
    record: Path | None,
    variables: dict[str, str],
    before: Callable[[], None] | None,
) -> None:
    # Python says nothing where what it should import in advance cannot be imported.
    assert "tests.faults.warm" in sys.modules, "torch was not imported in advance"
    if before is not None:
        before()
    mode = os.O_TRUNC if variables.get("RANK", "0") == "0" else os.O_APPEND
    descriptor = os.open(_terminal_file(folder), os.O_WRONLY | os.O_CREAT | mode, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.chdir(folder)
    for name in ("LD_PRELOAD", "PYTHONPATH"):
        os.environ.pop(name, None)
    os.environ.update({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TMPDIR": tempfile.gettempdir()} | variables)
    sys.argv = ["simpletuner", *arguments]
    if fault is not None or record is not None:
        decide = _decider(folder, fault, record)
        ctypes.CDLL(None).fault_arm(f"{folder}/".encode(), decide)
    from simpletuner.cli import main

    main()


_Decider = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)


def _decider(folder: Path, fault: Fault | None, record: Path | None) -> ctypes._CFunctionType:
    """Called at each operation: notes it in `record`, and says what is to happen."""
    package = f"{Path(simpletuner.__file__).parent}/"
    out = record.open("w", buffering=1) if record is not None else None
    met = _met_file(folder)
    met.unlink(missing_ok=True)
    seen = Counter[tuple[str, ...]]()
    numbers = itertools.count(1)
    is_met = False

    def decide(call: bytes, path: bytes) -> int:
        nonlocal is_met
        where = []
        frame = sys._getframe()
        while frame is not None and len(where) < 4:
            name = frame.f_code.co_filename
            if name.startswith(package):
                where.append(f"{name.removeprefix(package)}:{frame.f_lineno}")
            frame = frame.f_back
        inside = path.decode(errors="replace").removeprefix(f"{folder}/")
        operation = Operation(next(numbers), call.decode(), inside, tuple(where), 0)
        site = operation.site
        repeat = seen[site]
        seen[site] += 1
        if out is not None:
            out.write(json.dumps([operation.number, operation.call, inside, where, repeat]) + "\n")
        if fault is None:
            return 0
        if site == fault.at.site and repeat == fault.at.repeat:
            is_met = True
            met.touch()
        elif not (is_met and fault.persists):
            return 0
        return fault.error or -1

    return _Decider(decide)
