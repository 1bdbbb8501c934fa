"""What starts the processes of a run, and what they keep of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

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
