"""What waits for one service, between the thread that trains and the thread that sends.

Bounded: only the latest progress is kept, the oldest ordinary messages are dropped when there are too many, and what
must arrive waits here only until the sender has put it on the disk. Every operation takes a few microseconds.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from dataclasses import asdict

from simpletuner.reporting.events import PhaseProgress, StepDone
from simpletuner.reporting.webhooks.messages import CurvePoint, Message

# An event, and the steps since the last report.
LatestProgress = tuple[StepDone | PhaseProgress, list[CurvePoint]]

MAX_ITEMS = 500
MAX_BYTES = 4 << 20  # of ordinary messages, as JSON without their images
MAX_CURVE_POINTS = 1000


class Outbox:
    """A queue with three entrances.

    Attributes:
        dropped: ordinary messages that were dropped.
        num_bytes: what ordinary messages take.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ordinary: deque[tuple[Message, int]] = deque()
        self._urgent: list[Message] = []
        self._progress: dict[type, StepDone | PhaseProgress] = {}
        self._curve: list[CurvePoint] = []
        self.num_bytes = self.dropped = 0

    def put(self, message: Message) -> None:
        """Add a message; the oldest ordinary ones make room for it."""
        size = 0 if message.must_arrive else len(json.dumps(asdict(message), ensure_ascii=False))
        with self._lock:
            if message.must_arrive:
                self._urgent.append(message)
                return
            self._ordinary.append((message, size))
            self.num_bytes += size
            while self._ordinary and (len(self._ordinary) > MAX_ITEMS or self.num_bytes > MAX_BYTES):
                self.num_bytes -= self._ordinary.popleft()[1]
                self.dropped += 1

    def put_progress(self, event: StepDone | PhaseProgress, is_reported: bool = True) -> None:
        """Where the run stands; replaces what was reported before and not sent.

        Args:
            is_reported: False: only a point of the curve.
        """
        with self._lock:
            if isinstance(event, StepDone):
                self._curve.append(CurvePoint.of(event))
                self._curve = _thinned(self._curve)
            if is_reported:
                self._progress[type(event)] = event

    def take_urgent(self) -> list[Message]:
        """Remove and return what must be put on the disk."""
        with self._lock:
            taken, self._urgent = self._urgent, []
        return taken

    def first(self) -> Message | None:
        """The oldest ordinary message; it stays."""
        with self._lock:
            return self._ordinary[0][0] if self._ordinary else None

    def remove(self, message: Message) -> None:
        """Remove a message, unless it was dropped in the meantime."""
        with self._lock:
            if self._ordinary and self._ordinary[0][0] is message:
                self.num_bytes -= self._ordinary.popleft()[1]

    def take_progress(self, only_if_first: bool = False) -> LatestProgress | None:
        """The progress that waits, and the curve since the last one; phases before steps.

        Args:
            only_if_first: None while a message waits, which may have come after the sender looked for one.
        """
        with self._lock:
            if only_if_first and (self._ordinary or self._urgent):
                return None
            if (phase := self._progress.pop(PhaseProgress, None)) is not None:
                return phase, []
            if (step := self._progress.pop(StepDone, None)) is None:
                return None
            curve, self._curve = self._curve, []
            return step, curve

    def put_back_progress(self, event: StepDone | PhaseProgress, curve: list[CurvePoint]) -> None:
        """Return what could not be sent, unless there is something newer."""
        with self._lock:
            self._curve = _thinned([*curve, *self._curve])
            self._progress.setdefault(type(event), event)

    def drop_phase_progress(self) -> None:
        """Forget the progress of a phase that is over."""
        with self._lock:
            self._progress.pop(PhaseProgress, None)

    def __len__(self) -> int:
        return len(self._ordinary)


def _thinned(curve: list[CurvePoint]) -> list[CurvePoint]:
    while len(curve) > MAX_CURVE_POINTS:
        curve = curve[::2]
    return curve
