"""What waits for one service, between the thread that trains and the thread that sends.

Bounded: progress is only ever the latest, ordinary messages give way when there are too many, and what must arrive
waits here only until the sender has put it on the disk. Every operation is a few microseconds under a lock.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from dataclasses import asdict
from typing import Literal

from simpletuner.reporting.events import PhaseProgress, StepDone
from simpletuner.reporting.webhooks.messages import CurvePoint, Message

Slot = Literal["phase", "steps"]

MAX_ITEMS = 500
MAX_BYTES = 4 << 20
MAX_CURVE_POINTS = 1000


class Outbox:
    """A queue with three entrances.

    Args:
        max_items, max_bytes: of ordinary messages, as JSON without their images; the oldest give way.

    Attributes:
        dropped: ordinary messages that gave way.
    """

    def __init__(self, max_items: int = MAX_ITEMS, max_bytes: int = MAX_BYTES):
        self._lock = threading.Lock()
        self._max_items, self._max_bytes = max_items, max_bytes
        self._ordinary: deque[tuple[Message, int]] = deque()
        self._bytes = 0
        self._urgent: deque[Message] = deque()
        self._progress: dict[Slot, StepDone | PhaseProgress] = {}
        self._curve: list[CurvePoint] = []
        self.dropped = 0

    def put(self, message: Message) -> None:
        """Add a message; the oldest ordinary ones give way to it."""
        if message.must_arrive:
            with self._lock:
                self._urgent.append(message)
            return
        size = len(json.dumps(asdict(message), ensure_ascii=False))
        with self._lock:
            self._ordinary.append((message, size))
            self._bytes += size
            while len(self._ordinary) > self._max_items or (self._bytes > self._max_bytes and self._ordinary):
                _, freed = self._ordinary.popleft()
                self._bytes -= freed
                self.dropped += 1

    def put_progress(self, event: StepDone | PhaseProgress, is_reported: bool = True) -> None:
        """Where the run stands; takes the place of what was reported before and not sent.

        Args:
            is_reported: False: only a point of the curve.
        """
        with self._lock:
            if isinstance(event, PhaseProgress):
                self._progress["phase"] = event
                return
            self._curve.append(CurvePoint.of(event))
            if len(self._curve) > MAX_CURVE_POINTS:
                self._curve = self._curve[::2]
            if is_reported:
                self._progress["steps"] = event

    def take_urgent(self) -> list[Message]:
        """Remove and return what must be put on the disk."""
        with self._lock:
            taken = list(self._urgent)
            self._urgent.clear()
        return taken

    def first(self) -> Message | None:
        """The oldest ordinary message; it stays."""
        with self._lock:
            return self._ordinary[0][0] if self._ordinary else None

    def remove(self, message: Message) -> None:
        """Take a message out, where it has not given way in the meantime."""
        with self._lock:
            if self._ordinary and self._ordinary[0][0] is message:
                self._bytes -= self._ordinary.popleft()[1]

    def take_progress(self) -> tuple[StepDone | PhaseProgress, list[CurvePoint]] | None:
        """The progress that waits, and the curve since the last one; phases before steps."""
        with self._lock:
            if "phase" in self._progress:
                return self._progress.pop("phase"), []
            if "steps" not in self._progress:
                return None
            curve, self._curve = self._curve, []
            return self._progress.pop("steps"), curve

    def put_back_progress(self, event: StepDone | PhaseProgress, curve: list[CurvePoint]) -> None:
        """Return what could not be sent, unless there is something newer."""
        with self._lock:
            self._curve = [*curve, *self._curve]
            while len(self._curve) > MAX_CURVE_POINTS:
                self._curve = self._curve[::2]
            self._progress.setdefault("phase" if isinstance(event, PhaseProgress) else "steps", event)

    def drop_phase_progress(self) -> None:
        """Forget the progress of a phase that is over."""
        with self._lock:
            self._progress.pop("phase", None)

    @property
    def num_bytes(self) -> int:
        """What ordinary messages take."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._ordinary)
