"""A process that gives no sign is given up by name; one that only works for long is waited for."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.fsdp

from simpletuner.distributed import heartbeat
from simpletuner.distributed.frozen import address
from simpletuner.distributed.heartbeat import PeerLost
from simpletuner.distributed.launcher import listen
from simpletuner.distributed.process_group import joined
from simpletuner.errors import Interrupted
from tests.processes import variables_of


def in_two(first, second, minutes: float) -> list[dict]:
    """Run two forked processes, each with its work; the second one is frozen when it asks for it."""
    with TemporaryDirectory() as folder, listen() as listener:
        ranks, children = variables_of(2, listener), []
        for rank, work in enumerate((first, second)):
            child = os.fork()
            if child:
                children.append(child)
                continue
            answer: dict = {}
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a handler of Python's waits for the end of a call
                signal.alarm(120)
                os.environ.update(ranks[rank])
                with joined(os.environ, minutes) as process_group:
                    started = time.monotonic()
                    try:
                        answer["value"] = work(process_group)
                    except (PeerLost, Interrupted) as error:
                        answer = {"error": str(error), "code": error.exit_code}
                    answer["seconds"] = time.monotonic() - started
                    (Path(folder) / str(rank)).write_text(json.dumps(answer))
                    os._exit(0)  # leaving the group would wait for the frozen one
            finally:
                os._exit(0)
        os.waitpid(children[0], 0)
        os.kill(children[1], signal.SIGKILL)
        os.waitpid(children[1], 0)
        files = [Path(folder) / str(rank) for rank in (0, 1)]
        return [json.loads(file.read_text()) if file.is_file() else {} for file in files]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat, "QUIET_SECONDS", 0.5)


def freeze(process_group):
    process_group.barrier()
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGSTOP)


def asked(process_group):
    came = []
    signal.signal(signal.SIGTERM, lambda *args: came.append(1))
    process_group.heartbeat.stopping = lambda: Interrupted("stopped by SIGTERM", 143) if came else None
    process_group.barrier()
    if not os.fork():
        time.sleep(1.5)
        os.kill(os.getppid(), signal.SIGTERM)
        os._exit(0)
    process_group.barrier()


def wait_in_evaluation(process_group):
    process_group.barrier()
    process_group.barrier()


def wait_for_gradients(process_group):
    process_group.barrier()
    process_group.sum_gradients([torch.nn.Parameter(torch.ones(2))])


def wait_for_files(process_group):
    process_group.barrier()
    with process_group.main_first():
        pass


@pytest.mark.slow
@pytest.mark.parametrize("wait", [wait_in_evaluation, wait_for_gradients, wait_for_files])
def test_a_frozen_process_is_given_up_and_named_with_who_waited_where(wait: Callable[[Any], None]):
    """Not with what torch or contextlib puts around a function."""
    answer, _ = in_two(wait, freeze, minutes=1.5 / 60)
    assert answer["code"] == 3
    expected = f"process 1 of 2 has not responded for 0.025 minutes; process 0 waited for it in {wait.__name__}"
    assert expected in answer["error"]
    assert answer["seconds"] > 1.0


@pytest.mark.slow
def test_who_waits_for_one_of_another_machine_answers_once_it_was_silent_for_a_while(monkeypatch):
    monkeypatch.setattr(heartbeat, "is_frozen_at", lambda place: False)
    answer, _ = in_two(asked, freeze, minutes=10)
    assert answer["code"] == 143
    assert 1.0 < answer["seconds"] < 60


@pytest.mark.slow
def test_a_process_that_works_longer_than_the_limit_is_waited_for():
    def work(process_group):
        process_group.barrier()
        time.sleep(6)  # an encoding: the thread that counts goes on
        return process_group.sum([1.0])

    answers = in_two(lambda process_group: (process_group.barrier(), process_group.sum([1.0]))[1], work, minutes=4 / 60)
    assert answers[0]["value"] == [2.0]
    assert answers[0]["seconds"] > 5


@pytest.mark.slow
def test_who_waits_for_a_frozen_one_answers_a_signal_at_once(monkeypatch):
    monkeypatch.setattr(heartbeat, "QUIET_SECONDS", 300)  # it is seen to be stopped, long before its silence shows it
    answer, _ = in_two(asked, freeze, minutes=10)
    assert answer["code"] == 143
    assert answer["seconds"] < 60  # and not after ten minutes


def test_a_store_that_does_not_answer_is_the_loss_of_its_keeper_who_does_not_lose_himself() -> None:
    now = time.monotonic()
    for rank, lost in ((0, []), (1, [0]), (2, [0])):
        beat = heartbeat.Heartbeat(rank, 3, limit=60.0)
        beat._answered = now - 100
        assert beat.quiet(60.0) == lost
    beat = heartbeat.Heartbeat(1, 3, limit=60.0)
    beat._answered, beat._seen = now, {0: (b"7", now), 2: (b"7", now - 100)}
    assert beat.quiet(60.0) == [2]


def silent_for(seconds: float, **options) -> heartbeat.Heartbeat:
    """Process 1 of 3, of which process 2 has given no sign for so long, where the clock stands at 1000."""
    beat = heartbeat.Heartbeat(1, 3, **{"limit": 60.0} | options)
    beat._answered, beat._seen = 1000.0, {0: (b"7", 1000.0), 2: (b"7", 1000.0 - seconds)}
    return beat


def test_who_is_asked_to_stop_waits_for_a_silent_one_shorter_than_others_do(monkeypatch):
    monkeypatch.setattr(heartbeat, "QUIET_SECONDS", 10.0)
    monkeypatch.setattr(heartbeat, "time", SimpleNamespace(monotonic=lambda: 1000.0))
    error = Interrupted("stopped", 143)
    silent_for(30).check()
    with pytest.raises(heartbeat.PeerLost, match="process 2 of 3 has not responded for 1 minutes; process 1 waited"):
        silent_for(90).check()
    silent_for(5, stopping=lambda: error).check()
    with pytest.raises(Interrupted):
        silent_for(30, stopping=lambda: error).check()


class Store(dict):
    """The run's store; `down` answers nothing."""

    down = False

    def set(self, key: str, value: str) -> None:
        if self.down:
            raise RuntimeError("no answer")
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


class Waits:
    """An event that is set after so many waits; what was waited for."""

    def __init__(self, count: int):
        self.count, self.seconds = count, []

    def wait(self, seconds: float) -> bool:
        self.seconds.append(seconds)
        return len(self.seconds) > self.count


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now.seconds)
    return now


def test_each_process_counts_under_its_own_name_and_notes_when_the_others_last_did(clock):
    beat, store = heartbeat.Heartbeat(1, 3, 8.0), Store({"beat-0": b"5", "address-0": b"a/1", "address-2": b"b/2"})
    beat._seen = {0: (b"5", 90.0), 2: (b"", 91.0)}
    beat._ended = Waits(2)
    beat._count(store)
    assert (store["beat-1"], store["address-1"]) == (b"2", address().encode())
    assert beat._seen == {0: (b"5", 90.0), 2: (b"", 91.0)}  # neither has gone on
    assert beat._addresses == {0: "a/1", 2: "b/2"}
    assert beat._answered == 100.0
    assert beat._ended.seconds == [0.1] * 3
    store |= {"beat-0": b"6", "address-0": b"other"}
    beat._ended = Waits(1)
    beat._count(store)
    assert beat._seen == {0: (b"6", 100.0), 2: (b"", 91.0)}
    assert beat._addresses[0] == "a/1"
    clock.seconds, store.down = 200.0, True
    beat._ended, beat.limit = Waits(1), 0.2
    beat._count(store)
    assert beat._answered == 100.0
    assert beat._ended.seconds == [0.05] * 2  # a quarter of a short limit


def test_who_is_quiet_is_who_has_not_counted_for_longer_than_the_limit(clock):
    beat = heartbeat.Heartbeat(1, 3, 60.0)
    beat._answered, beat._seen = 100.0, {0: (b"", 90.0), 2: (b"", 89.0)}
    assert [beat.quiet(seconds) for seconds in (9.0, 10.0, 11.0)] == [[0, 2], [2], []]
    beat._answered = 88.0
    assert [beat.quiet(seconds) for seconds in (11.0, 12.0)] == [[0], []]  # the store is silent: its keeper is
    beat.rank = 0
    assert beat.quiet(11.0) == []


def test_the_lost_process_is_named_with_what_it_was_waited_for_in(clock):
    beat = heartbeat.Heartbeat(1, 4, 90.0, waits_in="evaluation")
    problem = beat.problem([0, 2])
    assert problem.message == (
        "process 0, 2 of 4 has not responded for 1.5 minutes; process 1 waited for it in evaluation"
    )
    assert problem.key == "distributed_timeout"
    assert problem.fix.startswith("check its machine and the network between them, then start again")
    beat._answered, beat._seen = 100.0, {0: (b"", 10.0), 2: (b"", 9.0)}
    with pytest.raises(PeerLost, match="process 2 of 4"):
        beat.check()
    beat._seen = {0: (b"", 99.4), 2: (b"", 99.6)}
    beat.check()
    beat.stopping = lambda: Interrupted("stopped", 143)
    with pytest.raises(Interrupted):  # one that was asked to stop waits for no longer than half a second here
        beat.check()
    beat._seen = {0: (b"", 99.5), 2: (b"", 99.6)}
    beat.check()
    beat._addresses = {0: address(), 2: "elsewhere/3"}
    assert beat.frozen() == []
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it is over, and nobody has asked for its code
    beat._addresses[2] = address().rpartition("/")[0] + f"/{child}"
    assert beat.frozen() == [2]
    with pytest.raises(Interrupted):
        beat.check()
    os.waitpid(child, 0)


@pytest.mark.parametrize(("words", "printed"), [(True, False), (False, True)])
def test_a_process_whose_main_thread_waits_in_a_library_is_ended_with_its_reason(
    clock, monkeypatch, capsys, words, printed
):
    left, codes = [], []

    def leave(text, environment):
        left.append(text)
        return words

    monkeypatch.setattr(heartbeat, "leave_last_words", leave)
    monkeypatch.setattr(heartbeat.os, "_exit", codes.append)
    beat = heartbeat.Heartbeat(0, 2, 60.0)
    beat._answered, beat._seen = 100.0, {1: (b"", 50.0)}
    beat._ended = Waits(3)
    beat._end_if_lost(None)
    assert codes == []
    assert beat._ended.seconds == [0.1] * 4  # nobody is lost
    beat._seen, beat._ended = {1: (b"", 30.0)}, Waits(3)
    beat._end_if_lost(None)
    assert codes == [3]
    assert beat._ended.seconds == [0.1, 15.0, 0.1, 15.0, 0.1]  # this one only notes that it is ended
    assert "process 1 of 2 has not responded for 1 minutes" in left[0]
    assert ("process 1 of 2" in capsys.readouterr().err) is printed


def test_a_process_is_ended_though_its_terminal_is_gone(clock, monkeypatch):
    def refuse(*words, **options):
        raise OSError(5, "Input/output error")

    codes = []
    monkeypatch.setattr(heartbeat, "leave_last_words", lambda text, environment: False)
    monkeypatch.setattr(heartbeat.os, "_exit", codes.append)
    monkeypatch.setattr(heartbeat, "print", refuse, raising=False)
    beat = heartbeat.Heartbeat(0, 2, 60.0)
    beat._answered, beat._seen, beat._ended = 100.0, {1: (b"", 30.0)}, Waits(3)
    beat._end_if_lost(None)
    assert codes == [3]


def test_a_collective_is_waited_for_and_said_to_be_over(clock, monkeypatch):
    """By hand: it is asked more rarely the longer it takes, and the others are looked at after a beat."""
    slept, checked = [], []
    times = iter([0.0, 0.001, 0.003, 0.09, 0.11, 0.12])

    def sleep(seconds):
        slept.append(seconds)
        clock.seconds = 100.0 + next(times, 1.0)

    monkeypatch.setattr(heartbeat.time, "sleep", sleep)
    answers = iter([False] * 7 + [True])
    waited = []
    work = SimpleNamespace(is_completed=lambda: next(answers), wait=waited.append)
    stopping = iter([None, None, Interrupted("stopped", 143)])
    beat = heartbeat.Heartbeat(0, 2, 60.0, stopping=lambda: next(stopping, None))
    monkeypatch.setattr(heartbeat.Heartbeat, "check", lambda self: checked.append((slept[:], self.waits_in)))
    heartbeat.wait_for(work, beat, "a sum")
    assert slept == [0.0, 0.0, 0.0, 0.0005, 0.0005, 0.01, 0.01]
    assert {where for _, where in checked} == {"a sum"}
    assert [len(before) for before, _ in checked] == [2, 5, 6]  # when a signal came, and after a beat of 0.1 seconds
    assert beat.waits_in == ""
    assert [each.total_seconds() for each in waited] == [60]
