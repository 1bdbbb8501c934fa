"""What starts the processes of a run, and what they keep of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from simpletuner.distributed import launcher
from simpletuner.distributed.frozen import address, is_frozen, is_frozen_at
from simpletuner.distributed.launcher import environment_outside, is_main
from simpletuner.distributed.lifeline import LAST_WORDS, LIFELINE, LISTENER, lifeline

WAITS = """
import os, time
from simpletuner.distributed.lifeline import hold_lifeline
assert hold_lifeline(os.environ)
assert not hold_lifeline(os.environ)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_process_is_reported_to_end_when_its_lifeline_does(tmp_path):
    words = tmp_path / "words" / "0"
    words.parent.mkdir()
    with lifeline() as end:
        environment = os.environ | {LIFELINE: str(end), LAST_WORDS: str(words)}
        process = subprocess.Popen(
            [sys.executable, "-c", WAITS], env=environment, pass_fds=(end,), stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert process.poll() is None
    assert process.wait(timeout=300) == -signal.SIGTERM
    assert not words.parent.exists()  # what is said from now on is printed


def test_a_program_that_a_process_starts_is_none_of_the_processes():
    environment = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
        LAST_WORDS: "x",
        LIFELINE: "3",
        LISTENER: "4",
        "HOME": "/home",
    }
    assert environment_outside(environment) == {"HOME": "/home"}


def test_one_of_several_processes_is_told_its_place_on_its_machine_too():
    """RANK and WORLD_SIZE alone are numbers of machines, as clusters export them."""
    numbers = {"RANK": "1", "WORLD_SIZE": "2"}
    for own in ("LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        assert launcher.is_started_already({**numbers, own: "0"})
        for lacking in numbers:
            environment = {own: "0", **{name: value for name, value in numbers.items() if name != lacking}}
            assert not launcher.is_started_already(environment)
    assert not launcher.is_started_already(numbers)
    kept, removed = {**numbers, "LOCAL_RANK": "1"}, {**numbers, "HOME": "/home"}
    for environment in (kept, removed):
        launcher.forget_machine_numbers(environment)
    assert kept == {**numbers, "LOCAL_RANK": "1"}
    assert removed == {"HOME": "/home"}
    assert launcher.Layout(2) == launcher.Layout(2, 1, 0, "127.0.0.1", None)


def test_waits_are_those_of_people():
    assert (launcher.GRACE_SECONDS, launcher.POLL_SECONDS, launcher.SAVING_SECONDS) == (20.0, 0.1, 600.0)


def test_a_process_is_known_as_frozen_where_it_can_be_seen(monkeypatch):
    place, _, own = address().rpartition("/")
    assert own == str(os.getpid())
    assert not is_frozen_at(address())
    process = started(DEAF.format(seconds=30))
    assert not is_frozen_at(f"{place}/{process.pid}")
    process.kill()
    process.wait()
    assert is_frozen_at(f"{place}/{process.pid}")  # it is gone
    assert not is_frozen_at(f"elsewhere/{place}/{process.pid}")

    def refuse(path):
        raise OSError("no /proc")

    monkeypatch.setattr("pathlib.Path.read_text", refuse)
    assert address() == f"unknown/{os.getpid()}"
    assert not is_frozen_at(f"unknown/{process.pid}")


def test_the_first_process_speaks_for_all():
    assert is_main({})
    assert is_main({"RANK": "0"})
    assert not is_main({"RANK": "1"})


DEAF = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
time.sleep({seconds})
exit(143)
"""


def started(code: str) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


@pytest.mark.parametrize(
    ("asked", "waits"),
    [([signal.SIGINT], "SAVING_SECONDS"), ([signal.SIGINT, signal.SIGINT], "GRACE_SECONDS")],
    ids=["once", "twice"],
)
def test_processes_that_hang_are_killed_soon_where_a_person_asks_twice(monkeypatch, asked, waits):
    """The time that counts is short; with the other one the process would end by itself, with its own code."""
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 600.0)
    monkeypatch.setattr(launcher, "SAVING_SECONDS", 600.0)
    monkeypatch.setattr(launcher, waits, 0.2)
    process, said = started(DEAF.format(seconds=600)), []
    assert launcher._wait([process], asked, said.append) == 0
    assert process.returncode == -signal.SIGKILL
    assert len(said) == 1


@pytest.mark.parametrize("others", [["print('ready', flush=True); exit(143)"], []], ids=["another left", "alone"])
def test_who_is_stopped_is_not_waited_for_once_a_signal_came(others):
    """With the time that one who saves is given, the test would take ten minutes."""
    stopped, said = started(DEAF.format(seconds=600)), []
    left = [started(code) for code in others]
    stopped.send_signal(signal.SIGSTOP)
    while not is_frozen(stopped.pid):
        time.sleep(0.01)
    assert launcher._wait([stopped, *left], [signal.SIGTERM], said.append) == len(left)
    assert stopped.returncode == -signal.SIGKILL
    assert len(said) == (0 if left else 1)


@pytest.mark.slow
def test_who_saves_after_another_has_left_on_a_signal_is_given_time(monkeypatch):
    """The main process may still write what another need not wait for."""
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.1)
    saving = started(DEAF.format(seconds=1))
    left = started("print('ready', flush=True); exit(143)")
    assert launcher._wait([saving, left], [signal.SIGTERM], print) == 1
    assert saving.returncode == 143


class Played:
    """A process that ends by itself with `code` when it has been looked at so often; None never does."""

    def __init__(self, looks: float, code: int = 0, on_term: int | None = None):
        self.looks, self.code, self.on_term = looks, code, on_term
        self.returncode: int | None = None
        self.pid, self.signals = id(self), []

    def poll(self) -> int | None:
        self.looks -= 1
        if self.returncode is None and self.looks < 0:
            self.returncode = self.code
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.signals.append(number)
        if number == signal.SIGKILL:
            self.returncode = -number
        elif self.on_term is not None:
            self.returncode = self.on_term


@pytest.mark.parametrize(("code", "cause"), [(0, 0), (143, 1)])
def test_one_that_saves_is_let_though_another_is_frozen(monkeypatch, code, cause):
    """When it has ended, the frozen one is killed."""
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.0)
    frozen, saves = Played(float("inf")), Played(30, code)
    monkeypatch.setattr(launcher, "is_frozen", lambda pid: pid == frozen.pid)
    assert launcher._wait([frozen, saves], [signal.SIGTERM], lambda line: None) == cause
    assert (saves.returncode, saves.signals) == (code, [])
    assert frozen.returncode == -signal.SIGKILL


def test_the_cause_stays_the_first_that_failed_and_the_others_are_asked_once(monkeypatch):
    monkeypatch.setattr(launcher, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(launcher, "is_frozen", lambda pid: False)
    leaves, failed, saves = Played(float("inf"), on_term=143), Played(5, code=3), Played(30, code=143)
    assert launcher._wait([leaves, failed, saves], [], print) == 1
    assert (leaves.signals, failed.signals, saves.signals) == ([signal.SIGTERM], [], [signal.SIGTERM])


def test_ranks_count_through_the_machines():
    layouts = [launcher.Layout(num_processes=4, num_machines=3, machine_rank=rank) for rank in range(3)]
    ranks = [launcher._rank(layout, local) for layout in layouts for local in range(4)]
    assert ranks == list(range(12))
    assert layouts[0].world_size == 12


def test_a_signal_becomes_the_shell_s_exit_code():
    assert [launcher._exit_code(code) for code in (0, 3, -signal.SIGKILL, -signal.SIGTERM)] == [0, 3, 137, 143]


def ended(*codes: int | None) -> list[SimpleNamespace]:
    return [SimpleNamespace(returncode=code, poll=lambda code=code: code) for code in codes]


def test_who_lost_a_connection_is_not_the_cause():
    """Code 1 is what a process ends with whose connection broke."""
    assert launcher._first_failure(ended(None, 0)) is None
    assert launcher._first_failure(ended(0, 1, 3)) == 2
    assert launcher._first_failure(ended(1, 1)) == 0
    assert launcher._first_failure(ended(0, None, -9, 4)) == 2


def test_who_saves_has_patience_and_who_hangs_has_little():
    saving, grace = launcher.SAVING_SECONDS, launcher.GRACE_SECONDS
    assert launcher._patience(None, 0) == float("inf")
    assert launcher._patience(None, 1) == launcher._patience(130, 0) == launcher._patience(143, 1) == saving
    assert launcher._patience(None, 2) == launcher._patience(1, 0) == launcher._patience(3, 1) == grace


def test_each_process_is_reported_who_it_is(monkeypatch, tmp_path):
    seen = {}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda command, **given: seen.update(given, command=command))
    layout = launcher.Layout(2, num_machines=2, machine_rank=1, address="10.0.0.1")
    launcher._start(["train", "--x"], layout, 1, 29500, tmp_path, 7)
    wanted = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}
    wanted |= {"MASTER_PORT": "29500", "OMP_NUM_THREADS": "1", LIFELINE: "7", LAST_WORDS: str(tmp_path / "1")}
    assert {name: seen["env"][name] for name in wanted} == wanted
    assert seen["command"][1:] == ["-P", "-m", "simpletuner", "train", "--x"]
    assert seen["start_new_session"]
    assert seen["pass_fds"] == (7,)
    assert LISTENER not in seen["env"]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    launcher._start(["train"], layout, 1, 29500, tmp_path, 7)
    assert seen["env"]["OMP_NUM_THREADS"] == "3"


def test_the_main_process_of_a_machine_gets_the_socket_that_the_others_find_it_at(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(launcher.subprocess, "Popen", lambda command, **given: started.append(given))
    with launcher.listen() as listener:
        port = listener.getsockname()[1]
        for rank in (0, 1):
            launcher._start(["train"], launcher.Layout(2), rank, port, tmp_path, 7, listener)
        with socket.create_connection(("127.0.0.1", port)):  # nobody has taken it over yet, and it answers already
            pass
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("127.0.0.1", port))
        assert [each["pass_fds"] for each in started] == [(7, listener.fileno()), (7,)]
        assert [each["env"].get(LISTENER) for each in started] == [str(listener.fileno()), None]


def test_a_process_is_known_to_be_stopped_only_where_it_can_be_seen():
    process = started(DEAF.format(seconds=600))
    there = f"{address().rpartition('/')[0]}/{process.pid}"
    assert not is_frozen_at(there)
    process.send_signal(signal.SIGSTOP)
    while not is_frozen(process.pid):
        time.sleep(0.01)
    assert is_frozen_at(there)
    assert not is_frozen_at(f"another machine/{process.pid}")
    assert not is_frozen_at(f"unknown/{process.pid}")
    process.kill()
    process.wait()
    assert is_frozen(process.pid)  # gone


def test_a_silent_end_is_told_with_who_and_what():
    assert launcher._silent_end(-signal.SIGKILL, 1, 4) == (
        "process 1 of 4 was killed (SIGKILL): most often the machine had no memory left; the others were ended"
    )
    assert launcher._silent_end(-signal.SIGSEGV, 0, 2) == "process 0 of 2 was ended by SIGSEGV; the others were ended"
    assert launcher._silent_end(7, 3, 4) == "process 3 of 4 ended with code 7; the others were ended"


@pytest.mark.parametrize(("returncode", "code", "speaker"), [(143, 143, 0), (1, 1, 1), (-signal.SIGKILL, 137, 1)])
def test_of_processes_that_leave_alike_the_first_speaks_and_of_lost_connections_the_one_that_was_seen(
    monkeypatch, returncode, code, speaker
):
    """The second one was seen to end first; the first may have been killed because it did not leave in time."""

    def start(arguments, layout, local_rank, port, folder, end, listener):
        (folder / str(local_rank)).write_text(f"words of {local_rank}")
        return ended(returncode)[0]

    heard = []
    monkeypatch.setattr(launcher, "_start", start)
    monkeypatch.setattr(launcher, "_wait", lambda processes, received, say: 1)
    assert launcher.launch(["train"], launcher.Layout(2, port=7), heard.append) == code
    assert heard == [f"words of {speaker}"]


@pytest.mark.parametrize(
    ("codes", "speaks", "code", "said"),
    [
        ((0, 0), (), 0, []),
        ((0, 3), (1,), 3, ["words of 1"]),
        ((1, 1), (0, 1), 1, ["words of 0"]),
        ((3, 1, 3), (0, 1, 2), 3, ["words of 0"]),
        (
            (1, -signal.SIGKILL),
            (0,),
            137,
            ["process 3 of 4 was killed (SIGKILL): most often the machine had no memory"],
        ),
    ],
    ids=str,
)
def test_the_process_that_failed_first_speaks_for_the_run(monkeypatch, codes, speaks, code, said):
    """Of the second of two machines, so that local and global ranks differ."""

    def start(arguments, layout, local_rank, port, folder, end, listener):
        assert port == 7
        if local_rank in speaks:
            (folder / str(local_rank)).write_text(f"words of {local_rank}")
        return ended(codes[local_rank])[0]

    heard = []
    monkeypatch.setattr(launcher, "_start", start)
    layout = launcher.Layout(len(codes), num_machines=2, machine_rank=1, port=7)
    assert launcher.launch(["train"], layout, heard.append) == code
    assert len(heard) == len(said)
    assert all(line.startswith(words) for line, words in zip(heard, said, strict=True))


def test_a_process_that_leaves_without_a_word_is_reported_unless_a_signal_came(monkeypatch):
    monkeypatch.setattr(launcher, "_start", lambda *_: ended(143)[0])
    for asked, count in (([], 1), ([signal.SIGTERM], 0)):
        monkeypatch.setattr(
            launcher, "_wait", lambda processes, received, say, asked=asked: received.extend(asked) or 0
        )
        heard = []
        assert launcher.launch(["train"], launcher.Layout(1, port=7), heard.append) == 143
        assert len(heard) == count


def test_who_asks_where_a_run_is_does_not_ask_it_to_stop():
    forwarded, before = [], signal.getsignal(signal.SIGUSR1)
    process = SimpleNamespace(poll=lambda: None, send_signal=forwarded.append)
    with launcher._forwarded_signals([process]) as received:
        signal.raise_signal(signal.SIGUSR1)
        assert (forwarded, received) == ([signal.SIGUSR1], [])
        signal.raise_signal(signal.SIGTERM)
        assert (forwarded, received) == ([signal.SIGUSR1, signal.SIGTERM], [signal.SIGTERM])
    assert signal.getsignal(signal.SIGUSR1) == before


@pytest.mark.parametrize("ignores", [False, True])
def test_the_end_of_a_terminal_goes_on_to_the_processes_but_for_a_run_under_nohup(ignores: bool) -> None:
    forwarded: list[int] = []
    process = SimpleNamespace(poll=lambda: None, send_signal=forwarded.append)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignores else signal.SIG_DFL)
    try:
        with launcher._forwarded_signals([process]) as received:
            assert (signal.getsignal(signal.SIGHUP) == signal.SIG_IGN) == ignores
            signal.raise_signal(signal.SIGHUP)
        assert received == forwarded == ([] if ignores else [signal.SIGHUP])
    finally:
        signal.signal(signal.SIGHUP, before)
