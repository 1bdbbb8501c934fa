"""What a process reads when another one of its run is gone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from simpletuner.distributed.launcher import listen
from simpletuner.distributed.process_group import ConnectionLost
from simpletuner.errors import Interrupted
from simpletuner.training.signals import StopRequest
from simpletuner.training.trainer import stopped_by_signals
from tests.processes import variables_of

LEAVES = """
import os
from simpletuner.distributed.process_group import ConnectionLost, joined
with joined(os.environ) as world:
    world.barrier()
    if not world.is_main:
        os._exit(3)
    try:
        world.sum([1.0])
    except ConnectionLost as error:
        print(error.render())
        os._exit(0)
"""


@pytest.mark.slow
def test_a_connection_that_breaks_is_reported_as_a_process_that_ended():
    with listen() as listener:
        command, open_too = [sys.executable, "-c", LEAVES], (listener.fileno(),)
        main, _ = (
            subprocess.Popen(command, env=os.environ | place, stdout=subprocess.PIPE, text=True, pass_fds=open_too)
            for place in variables_of(2, listener)
        )
    reported, _ = main.communicate(timeout=120)
    assert main.returncode == 0
    assert reported.startswith("another process of this run has ended, and reports the reason itself")


def test_who_waits_for_a_process_that_left_on_a_signal_leaves_on_it_too():
    stop = StopRequest()
    with pytest.raises(ConnectionLost), stopped_by_signals(stop):
        raise ConnectionLost("gone")
    stop.adopt()
    with pytest.raises(Interrupted, match="stopped by SIGTERM"), stopped_by_signals(stop):
        raise ConnectionLost("gone")
