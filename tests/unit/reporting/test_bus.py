"""The event bus: a failing sink is warned about once and asked again, a programming mistake in a sink is raised."""

from __future__ import annotations

import pytest

from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Event, Notice


class RecordingSink:
    name = "recorder"
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, error: Exception | None = None, close_error: Exception | None = None):
        self.events: list[Event] = []
        self.closed = 0
        self._error = error
        self._close_error = close_error

    def handle(self, event: Event) -> None:
        self.events.append(event)
        if self._error:
            raise self._error

    def close(self) -> None:
        self.closed += 1
        if self._close_error:
            raise self._close_error


def test_a_sink_that_breaks_is_left_alone_with_one_warning_and_the_rest_go_on():
    broken, healthy = RecordingSink(OSError("disk full")), RecordingSink()
    bus = EventBus([broken, healthy])
    for number in range(3):
        bus.emit(Notice("info", str(number)))
    assert len(broken.events) == 1
    texts = [event.text for event in healthy.events]
    assert [text for text in texts if text.isdigit()] == ["0", "1", "2"]
    assert [text for text in texts if "disk full" in text] == [
        "recorder stopped working (disk full); the run continues, and it is tried again each minute"
    ]


def test_a_sink_that_broke_is_asked_again_later_and_reported_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("simpletuner.reporting.bus.RETRY_SECONDS", 0.0)
    broken, healthy = RecordingSink(OSError("disk full")), RecordingSink()
    bus = EventBus([broken, healthy])
    for number in range(3):
        bus.emit(Notice("info", str(number)))
    assert [event.text for event in broken.events if event.text.isdigit()] == ["0", "1", "2"]
    assert sum("disk full" in event.text for event in healthy.events) == 1


def test_a_mistake_in_a_sink_is_not_hidden():
    bus = EventBus([RecordingSink(KeyError("loss"))])
    with pytest.raises(KeyError):
        bus.emit(Notice("info", "x"))


def test_every_sink_is_closed_once_and_reported_of_one_that_cannot_close():
    first, last = RecordingSink(), RecordingSink(close_error=OSError("gone"))
    with EventBus([first, last]) as bus:
        pass
    bus.close()
    assert (first.closed, last.closed) == (1, 1)
    assert [event.text for event in first.events] == ["recorder could not be closed (gone)"]


class BackgroundSink(RecordingSink):
    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[Notice] = []

    def take_notices(self) -> list[Notice]:
        taken, self.waiting = self.waiting, []
        return taken

    def close(self) -> None:
        self.waiting.append(Notice("warning", "2 messages were not sent"))


def test_a_sink_that_works_in_the_background_is_heard_with_the_next_event_and_at_the_end():
    first, background = RecordingSink(), BackgroundSink()
    bus = EventBus([first, background])
    background.waiting.append(Notice("warning", "no answer"))
    bus.emit(Notice("info", "one"))
    bus.emit(Notice("info", "two"))
    bus.close()
    assert [event.text for event in first.events] == ["one", "no answer", "two", "2 messages were not sent"]
