"""Follows the `metrics.jsonl` of a run that has no webhook, and gives the monitor what a webhook would have sent."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from simpletuner.config.webhooks import Webhook
from simpletuner.reporting import events
from simpletuner.reporting.events import NAMES_FROM_RECORDS, Event, RunStarted, SavedImage, StepDone, event_name_of
from simpletuner.reporting.monitor.history import History, Image
from simpletuner.reporting.sinks.jsonl import METRICS_FILE
from simpletuner.reporting.webhooks.encoding import raw_event
from simpletuner.reporting.webhooks.images import load_images
from simpletuner.reporting.webhooks.messages import CurvePoint, Message, progress_message, words_for
from simpletuner.text import read_json_text

POLL_SECONDS = 0.5
_IMAGE_BYTES = 8 << 20
# Steps that are read at once, at the start, are one report of progress.
_STEPS_PER_REPORT = 500
_ITSELF = Webhook(webhook_type="raw", callback_url=SecretStr("http://localhost/"))
_EVENTS: Mapping[str, type[Event]] = {
    event_name_of(kind): kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)
}


class Follower:
    """Reads a file as it grows; one that was started again is read from its beginning.

    Args:
        output_dir: of the run.
    """

    def __init__(self, output_dir: Path, history: History):
        self._output_dir, self._history = Path(output_dir), history
        self._path = self._output_dir / METRICS_FILE
        self._run_name = self._output_dir.name
        self._inode, self._position = -1, 0
        self._curve: list[CurvePoint] = []
        self._last: StepDone | None = None

    def follow(self, is_over: threading.Event) -> None:
        """Read until `is_over`."""
        while not is_over.is_set():
            self.read()
            is_over.wait(POLL_SECONDS)

    def read(self) -> None:
        """Take in what was written since the last call."""
        found = [(event_of(record), record) for record in self._new_records()]
        # What comes before the start of a run belongs to it too.
        self._run_name = next((event.run_name for event, _ in found if isinstance(event, RunStarted)), self._run_name)
        for event, record in found:
            if isinstance(event, StepDone):
                self._add_step(event)
            elif event is not None:
                self._flush()
                self._report(event, record)
        self._flush()

    def _new_records(self) -> Iterator[dict[str, Any]]:
        try:
            state = self._path.stat()
            if state.st_ino != self._inode or state.st_size < self._position:
                if self._position:
                    self._history.forget(self._run_name)
                self._inode, self._position = state.st_ino, 0
            with self._path.open("rb") as file:
                file.seek(self._position)
                lines = file.readlines()
        except FileNotFoundError:
            return
        for line in lines:
            if not line.endswith(b"\n"):  # half a line: the next call reads it whole
                return
            self._position += len(line)
            try:
                record = read_json_text(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record

    def _add_step(self, event: StepDone) -> None:
        self._curve.append(CurvePoint.of(event))
        self._last = event
        if len(self._curve) >= _STEPS_PER_REPORT:
            self._flush()

    def _flush(self) -> None:
        if self._last is not None:
            self._add(progress_message(self._last, self._run_name, self._curve))
            self._curve, self._last = [], None

    def _report(self, event: Event, record: Mapping[str, Any]) -> None:
        for message in words_for(event, self._run_name):
            self._add(dataclasses.replace(message, created=float(record.get("time", message.created))))

    def _add(self, message: Message) -> None:
        attachments = load_images(message.images, _IMAGE_BYTES * max(len(message.images), 1))
        event = raw_event(_ITSELF, message, [None] * len(attachments), None)
        sent = [attachment for attachment in attachments if attachment]
        indices = iter(range(len(sent)))
        for image, attachment in zip(event["data"].get("pictures", ()), attachments, strict=False):
            image["image"] = next(indices) if attachment else None
        self._history.add(event, [Image(attachment.media_type, attachment.data) for attachment in sent])


def event_of(record: Mapping[str, Any]) -> Event | None:
    """The event that a line of `metrics.jsonl` tells of; None for one that this version does not know."""
    kind = _EVENTS.get(str(record.get("event")))
    if kind is None:
        return None
    types = {field.name: str(field.type) for field in dataclasses.fields(kind)}
    named = {NAMES_FROM_RECORDS.get(key, key): value for key, value in record.items()}
    values = {key: _read(value, types[key]) for key, value in named.items() if key in types}
    try:
        if "images" in values:
            values["images"] = tuple(_image(image) for image in values["images"])
        if "image" in values:
            values["image"] = _image(values["image"])
        return kind(**values)
    except (TypeError, KeyError, ValueError):
        return None


def _image(record: Mapping[str, Any]) -> SavedImage:
    return SavedImage(**{**record, "path": Path(record["path"])})


def _read(value: Any, kind: str) -> Any:
    """A number that is not finite is written by its name."""
    return float(value) if isinstance(value, str) and kind.startswith("float") else value
