"""Trackers in threads of their own: order, failures, and a tracker that hangs never slows a step."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import (
    Event,
    ImagesMade,
    Notice,
    RunFailed,
    RunFinished,
    RunStarted,
    SavedImage,
    StepDone,
)
from simpletuner.reporting.trackers import background
from simpletuner.reporting.trackers.background import TrackerSink
from simpletuner.reporting.trackers.base import Tracker
from tests.events import step_done


class Notes:
    """A sink that keeps what is reported."""

    name, failures = "notes", ()

    def __init__(self) -> None:
        self.texts: list[str] = []

    def handle(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.texts.append(event.text)

    def close(self) -> None:
        pass


class Recorder(Tracker):
    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def start(self, run):
        self.calls.append(("start", run.name, run.project, run.start_step))
        return "here"

    def log_scalars(self, scalars, step):
        self.calls.append((step, scalars["train/loss"]))

    def log_images(self, images, step):
        self.calls.append((step, *[image.shortname for image in images]))

    def finish(self, exit_code):
        self.calls.append(("finish", exit_code))


def started(folder: Path, start_step: int = 0) -> RunStarted:
    return RunStarted("trial", folder, 10, start_step)


def step(number: int) -> StepDone:
    return step_done(number, loss=number / 10)


def test_a_tracker_gets_everything_in_order(tmp_path: Path):
    tracker, notes = Recorder(), Notes()
    image = SavedImage(tmp_path / "a.png", "cat", "a cat", 8, 8, 1, "live")
    with EventBus([notes, TrackerSink("mine", lambda: tracker, "project")]) as bus:
        for event in (started(tmp_path, 4), step(5), ImagesMade(5, (image,)), step(6), RunFinished(6, 1.0)):
            bus.emit(event)
    assert tracker.calls == [("start", "trial", "project", 4), (5, 0.5), (5, "cat"), (6, 0.6), ("finish", 0)]
    assert notes.texts == ["mine: here"]


def test_a_tracker_learns_how_a_run_failed(tmp_path: Path):
    for last, exit_code in ((RunFailed(1, "no", 4), 4), (None, 1)):
        tracker = Recorder()
        with EventBus([TrackerSink("mine", lambda tracker=tracker: tracker)]) as bus:
            for event in (started(tmp_path), step(1), last):
                if event:
                    bus.emit(event)
        assert tracker.calls[-1] == ("finish", exit_code)


def test_a_tracker_that_breaks_is_reported_once_and_the_run_goes_on(tmp_path: Path):
    class Broken(Recorder):
        def log_scalars(self, scalars, step):
            raise ZeroDivisionError("no\nsecond line")

    tracker, notes = Broken(), Notes()
    sink = TrackerSink("mine", lambda: tracker)
    with EventBus([notes, sink]) as bus:
        bus.emit(started(tmp_path))
        for number in range(1, 50):
            bus.emit(step(number))
    assert notes.texts == ["mine: here", "mine stopped working (ZeroDivisionError: no); the run continues without it"]
    assert tracker.calls == [("start", "trial", None, 0)]


def test_a_tracker_that_hangs_holds_up_neither_steps_nor_the_end_and_fills_no_memory(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(background, "QUEUE_LENGTH", 100)
    release, hangs = threading.Event(), threading.Event()

    class Hanging(Recorder):
        def start(self, run):
            hangs.set()
            release.wait(30)
            hangs.clear()

    notes = Notes()
    sink = TrackerSink("mine", Hanging, drain_seconds=0.2)
    with EventBus([notes, sink]) as bus:
        bus.emit(started(tmp_path))
        assert hangs.wait(20)
        for number in range(1, 1001):
            bus.emit(step(number))
        assert len(sink._queue) == 100
    assert hangs.is_set()  # whoever had waited for it would be here after its 30 s
    release.set()
    assert notes.texts == ["mine did not end within 0.2 s; metrics.jsonl has everything"]


@pytest.mark.parametrize(("start_step", "exit_code"), [(9, 1), (10, 0), (12, 0)])
def test_a_run_of_which_nothing_is_left_did_not_fail(tmp_path: Path, start_step: int, exit_code: int):
    """Of 10 steps; without its end, a run has failed."""
    tracker = Recorder()
    with EventBus([TrackerSink("mine", lambda: tracker)]) as bus:
        bus.emit(started(tmp_path, start_step))
    assert tracker.calls[-1] == ("finish", exit_code)
