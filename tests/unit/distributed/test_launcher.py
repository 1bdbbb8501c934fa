"""What starts the processes of a run, and what they keep of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from simpletuner.distributed import launcher
from simpletuner.distributed.launcher import environment_outside, is_main
from simpletuner.distributed.lifeline import LAST_WORDS, LIFELINE, lifeline

WAITS = """
import os, time
from simpletuner.distributed.lifeline import hold_lifeline
assert hold_lifeline(os.environ)
assert not hold_lifeline(os.environ)
print("ready", flush=True)
time.sleep(60)
"""


def test_a_process_is_told_to_end_when_its_lifeline_does(tmp_path):
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
    assert process.wait(timeout=20) == -signal.SIGTERM
    assert not words.parent.exists()  # what is said from now on is printed


def test_a_program_that_a_process_starts_is_none_of_the_processes():
    environment = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1", LAST_WORDS: "x", LIFELINE: "3", "HOME": "/home"}
    assert environment_outside(environment) == {"HOME": "/home"}


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


@pytest.mark.parametrize("asked", [[signal.SIGINT], [signal.SIGINT, signal.SIGINT]], ids=["once", "twice"])
def test_processes_that_hang_are_killed_soon_where_a_person_asks_twice(monkeypatch, asked):
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(launcher, "SAVING_SECONDS", 2.0)
    process, said, begun = started(DEAF.format(seconds=60)), [], time.monotonic()
    assert launcher._wait([process], asked, said.append) == 0
    assert process.returncode == -signal.SIGKILL
    assert len(said) == 1
    assert (time.monotonic() - begun > 1.5) == (len(asked) == 1)


def test_who_saves_after_another_has_left_on_a_signal_is_given_time(monkeypatch):
    """The main process may still write what another need not wait for."""
    monkeypatch.setattr(launcher, "GRACE_SECONDS", 0.1)
    saving = started(DEAF.format(seconds=1))
    left = started("print('ready', flush=True); exit(143)")
    assert launcher._wait([saving, left], [signal.SIGTERM], print) == 1
    assert saving.returncode == 143
