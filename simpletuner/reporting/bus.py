"""Carries events from training to the sinks. A sink that fails is warned about and asked again later; training
continues."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from simpletuner.errors import DataError
from simpletuner.reporting.events import Event, Notice

# How long a sink that failed is left alone: a disk that is full now may have room later.
RETRY_SECONDS = 60.0


class Sink(Protocol):
    """Shows or keeps events.

    `failures` are the exceptions that the outside world can cause (disk full, connection lost): they cost events of the
    sink, not the run, and it must be able to go on after them. Anything else is a mistake in the sink and is raised.
    """

    name: str
    failures: tuple[type[Exception], ...]

    def handle(self, event: Event) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class NoticeSource(Protocol):
    """A sink that works in the background and has something to say of it: a service that does not answer."""

    def take_notices(self) -> list[Notice]:
        """What happened since the last call. Called by the thread that emits, after each event and after `close`."""
        ...


def failures_of(sink: Sink) -> tuple[type[Exception], ...]:
    """What costs events of the sink and not the run; `storage` words what a disk refuses as a DataError."""
    return (*sink.failures, DataError)


class EventBus:
    """Hands each event to each sink, in the order of the sinks. Works as a context manager that closes them.

    Args:
        sinks: only the main process has any; an empty bus is the silence of the others.
    """

    def __init__(self, sinks: Iterable[Sink] = ()):
        self._sinks = list(sinks)
        self._notice_sources = [sink for sink in self._sinks if isinstance(sink, NoticeSource)]
        self._next_tries: dict[int, float] = {}  # of sinks that have failed

    def emit(self, event: Event) -> None:
        """Show and keep `event`. Never raises for a sink's own failure."""
        for sink in self._sinks:
            if self._next_tries.get(id(sink), 0.0) > time.monotonic():
                continue
            try:
                sink.handle(event)
            except failures_of(sink) as error:
                self._rest(sink, error)
        for source in self._notice_sources:
            for notice in source.take_notices():
                self.emit(notice)

    def close(self) -> None:
        """Flush and close all sinks, the last one first, so that the first can still tell of the others' failures."""
        while self._sinks:
            sink = self._sinks.pop()
            try:
                sink.close()
            except failures_of(sink) as error:
                self.emit(Notice("warning", f"{sink.name} could not be closed ({error})"))
            if isinstance(sink, NoticeSource):
                self._notice_sources.remove(sink)
                for notice in sink.take_notices():
                    self.emit(notice)

    def _rest(self, sink: Sink, error: Exception) -> None:
        """Leave a sink alone for a while; its first failure is reported."""
        is_first = id(sink) not in self._next_tries
        self._next_tries[id(sink)] = time.monotonic() + RETRY_SECONDS
        if is_first:
            text = f"{sink.name} stopped working ({error}); the run continues, and it is tried again each minute"
            self.emit(Notice("warning", text))

    def __enter__(self) -> EventBus:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
