"""SIGTERM, SIGINT and SIGHUP (the terminal is gone) ask a run to save and leave; a second SIGINT ends it at once.

SIGHUP stays ignored where it was ignored at the start, as `nohup` does.

The handler only sets a number. Everything that takes time (saving, logging) happens where the loop polls it.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

from simpletuner.errors import EXIT_HANGUP, EXIT_INTERRUPTED, EXIT_TERMINATED, Interrupted

EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED, signal.SIGHUP: EXIT_HANGUP}


class StopRequest:
    """Listens for signals while it is entered; handlers are restored on the way out."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise KeyboardInterrupt
        self.received = signal.Signals(number)

    def __bool__(self) -> bool:
        return self.received is not None

    def adopt(self) -> None:
        """Stop because another process of the run was asked to."""
        self.received = self.received or signal.SIGTERM

    def error(self, saved: str | None) -> Interrupted:
        """The error that ends the run, with the shell's exit code for the signal."""
        assert self.received is not None
        kept = f"saved {saved}; the same command continues from there" if saved else "nothing was trained yet"
        return Interrupted(f"stopped by {self.received.name}: {kept}", EXIT_CODES[self.received])

    def error_while_waiting(self) -> Interrupted | None:
        """The error that ends a run whose other processes give no sign, so that nothing can be saved together."""
        if self.received is None:
            return None
        text = "while another process gave no sign: what was trained since the last checkpoint is not saved"
        return Interrupted(f"stopped by {self.received.name} {text}", EXIT_CODES[self.received])

    def check(self) -> None:
        """Raise where no optimizer step has been taken yet: during caching and set-up there is nothing to save.

        Raises:
            Interrupted: a signal arrived.
        """
        if self:
            raise self.error(saved=None)
