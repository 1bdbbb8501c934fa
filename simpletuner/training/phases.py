"""Stretches of work around the steps, reported as events."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import PhaseDone, PhaseProgress, PhaseStarted


class Phase:
    """Handle of a running phase: count items with `advance`, say the result with `summary`."""

    def __init__(self, name: str, bus: EventBus):
        self.name = name
        self.bus = bus
        self.done = 0
        self.summary = ""

    def advance(self, count: int = 1) -> None:
        self.done += count
        self.bus.emit(PhaseProgress(self.name, self.done))


@contextmanager
def phase(bus: EventBus, name: str, total: int | None = None) -> Iterator[Phase]:
    """Tell the start and end of a phase; an error ends it untold, the run's own message follows."""
    started = time.monotonic()
    bus.emit(PhaseStarted(name, total))
    handle = Phase(name, bus)
    yield handle
    bus.emit(PhaseDone(name, time.monotonic() - started, handle.summary))
