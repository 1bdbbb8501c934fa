"""Processes end with the launcher that started them, however it ends: a killed one can tell them nothing.

Each of them holds the reading end of a pipe whose writing end only the launcher has. The system closes that with the
launcher. Without this they would go on training, and hold their accelerators, with nobody left who could stop them all.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

# The descriptor of the reading end.
LIFELINE = "SIMPLETUNER_LIFELINE"
# The descriptor of the socket at which the main process is found.
LISTENER = "SIMPLETUNER_LISTENER"
# Where a process leaves its last words for the launcher.
LAST_WORDS = "SIMPLETUNER_LAST_WORDS"
# To finish a step and save, when a signal asks for it. A process that hangs in a collective answers none.
SAVING_SECONDS = 600.0


@contextmanager
def lifeline() -> Iterator[int]:
    """The reading end, for processes to inherit; it comes to its end with the context, or with this process."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)


def hold_lifeline(environment: MutableMapping[str, str]) -> bool:
    """Have SIGTERM sent to this process when its launcher is gone: it saves and leaves, or is made to.

    Args:
        environment: of this process; the lifeline is taken out, for it is no other program's.

    Returns:
        Whether there is a lifeline: our launcher has started this process.
    """
    descriptor = environment.pop(LIFELINE, None)
    if descriptor is None:
        return False
    arguments = (int(descriptor), environment)
    threading.Thread(target=_end_with_launcher, args=arguments, name="lifeline", daemon=True).start()
    return True


def _end_with_launcher(descriptor: int, environment: MutableMapping[str, str]) -> None:
    os.read(descriptor, 1)  # nobody writes: it returns at the end
    if words := environment.pop(LAST_WORDS, None):  # nobody would read them there
        shutil.rmtree(Path(words).parent, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVING_SECONDS)
    os._exit(128 + signal.SIGTERM)
