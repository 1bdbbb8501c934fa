"""Drives a tracker from a thread of its own: a dashboard that is slow, offline or broken costs training nothing.

The training thread only appends to a queue; the worker looks at it twice a second, which is cheaper for a fast step
than being woken by each. The queue is bounded: what a hanging service leaves behind is counted, not kept.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from simpletuner.reporting.events import Event, ImagesMade, Notice, RunFailed, RunFinished, RunStarted
from simpletuner.reporting.scalars import scalars
from simpletuner.reporting.trackers.base import TrackedRun, Tracker

POLL_SECONDS = 0.5
QUEUE_LENGTH = 20_000
DRAIN_SECONDS = 60.0
ENDED_UNEXPECTEDLY = 1


class TrackerSink:
    """The sink of one tracker.

    Args:
        name: as the terminal calls it.
        make: makes the tracker, in the worker thread: its imports do not hold up the run.
        project: `tracker_project_name`.
        drain_seconds: how long the end of a run waits for the tracker.
    """

    failures: tuple[type[Exception], ...] = ()

    def __init__(
        self, name: str, make: Callable[[], Tracker], project: str | None = None, drain_seconds: float = DRAIN_SECONDS
    ):
        self.name = name
        self._make = make
        self._project = project
        self._drain_seconds = drain_seconds
        self._queue: deque[Event] = deque()
        self._notices: deque[Notice] = deque()
        self._ending = threading.Event()
        self._worker: threading.Thread | None = None
        self._lost = 0
        self._exit_code = ENDED_UNEXPECTEDLY
        self._has_failed = False

    def handle(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            if event.is_complete or event.start_step >= event.total_steps:
                self._exit_code = 0  # nothing is left to do, which is not a failure
            self._start(event)
        elif isinstance(event, RunFailed | RunFinished):
            self._exit_code = event.exit_code if isinstance(event, RunFailed) else 0
        elif self._worker is not None and not self._has_failed and (isinstance(event, ImagesMade) or scalars(event)):
            if len(self._queue) < QUEUE_LENGTH:
                self._queue.append(event)
            else:
                self._lost += 1

    def take_notices(self) -> list[Notice]:
        return [self._notices.popleft() for _ in range(len(self._notices))]

    def close(self) -> None:
        """Let the tracker take what is left, for a limited time."""
        if self._worker is None:
            return
        self._ending.set()
        self._worker.join(self._drain_seconds)
        if self._worker.is_alive():
            text = f"{self.name} did not end within {self._drain_seconds:g} s; metrics.jsonl has everything"
            self._notices.append(Notice("warning", text))
        elif self._lost:
            text = f"{self.name} was too slow for {self._lost} records; metrics.jsonl has everything"
            self._notices.append(Notice("warning", text))
        self._worker = None

    def _start(self, event: RunStarted) -> None:
        run = TrackedRun(
            event.run_name,
            self._project,
            event.output_dir,
            event.start_step,
            event.total_steps,
            event.options,
            event.details,
            event.run_id,
            event.branch,
        )
        self._worker = threading.Thread(target=self._work, args=(run,), name=f"tracker {self.name}", daemon=True)
        self._worker.start()

    def _work(self, run: TrackedRun) -> None:
        """The thread. Somebody else's code runs here: whatever it raises costs the tracker, not a run of days."""
        try:
            tracker = self._make()
            reported = tracker.start(run)
            if reported:
                self._notices.append(Notice("info", f"{self.name}: {reported}"))
            while not self._ending.wait(POLL_SECONDS):
                self._hand_over(tracker)
            self._hand_over(tracker)
            tracker.finish(self._exit_code)
        except Exception as error:  # noqa: BLE001
            self._has_failed = True
            self._queue.clear()
            reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            self._notices.append(
                Notice("warning", f"{self.name} stopped working ({reason}); the run continues without it")
            )

    def _hand_over(self, tracker: Tracker) -> None:
        while self._queue:
            event = self._queue.popleft()
            if isinstance(event, ImagesMade):
                tracker.log_images(event.images, event.step)
            else:
                tracker.log_scalars(scalars(event), event.step)  # type: ignore[attr-defined]
