"""A process that gives no sign is given up by name; one that only works for long is waited for."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
import torch.distributed.fsdp  # noqa: F401 - imported once, and not in each process

from simpletuner.distributed import heartbeat
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


def test_a_frozen_process_is_given_up_and_named_with_who_waited_where():
    answer, _ = in_two(wait_in_evaluation, freeze, minutes=1.5 / 60)
    assert answer["code"] == 3
    assert "process 1 of 2 has not responded for 0.025 minutes; process 0 waited for it in wait_in" in answer["error"]
    assert answer["seconds"] > 1.0


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
