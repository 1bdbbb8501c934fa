"""Which signals ask a run to save and leave."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from simpletuner.distributed import launcher
from simpletuner.errors import Interrupted
from simpletuner.training.signals import StopRequest


@pytest.fixture(autouse=True)
def hang_up() -> Iterator[None]:
    """A hang-up is not ignored here, whatever the tests were started under."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_asks_to_save_and_gives_the_shell_s_exit_code(number, code):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        os.kill(os.getpid(), number)
        assert stop
        error = stop.error(saved="checkpoint-4")
    assert error.exit_code == code
    assert f"stopped by {number.name}: saved checkpoint-4" in str(error)
    assert signal.getsignal(number) == before


def test_a_hang_up_that_was_ignored_at_the_start_stays_ignored():
    """As `nohup` leaves it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop, launcher._forwarded_signals([]) as received:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop
            assert received == []
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_launcher_passes_a_hang_up_on_and_waits_for_the_save():
    with launcher._forwarded_signals([]) as received:
        os.kill(os.getpid(), signal.SIGHUP)
    assert received == [signal.SIGHUP]
    assert launcher._patience(129, 0) == launcher._patience(143, 0)


def test_a_second_interrupt_ends_the_program_at_once_and_no_other_signal_does():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_stop_says_what_is_kept_before_the_first_step_and_while_another_process_is_silent():
    stop = StopRequest()
    stop.check()
    assert stop.error_while_waiting() is None
    stop.received = signal.SIGHUP
    with pytest.raises(Interrupted, match="stopped by SIGHUP: nothing was trained yet"):
        stop.check()
    error = stop.error_while_waiting()
    assert error is not None
    assert error.exit_code == 129
    assert "while another process gave no sign: what was trained since the last checkpoint is not saved" in str(error)


def test_a_process_that_was_asked_itself_keeps_its_signal():
    stop = StopRequest()
    stop.adopt()
    assert stop.received == signal.SIGTERM
    stop = StopRequest()
    stop.received = signal.SIGINT
    stop.adopt()
    assert stop.error(None).exit_code == 130
