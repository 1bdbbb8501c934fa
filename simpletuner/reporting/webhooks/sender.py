"""Brings the messages of one outbox to its service, one at a time and in order, for as long as it takes.

Runs inside the event loop of the background thread. What must arrive goes to the disk at once, also while a request is
under way, and leaves it when the service has answered. tenacity decides when to try again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from simpletuner.config.webhooks import Webhook
from simpletuner.errors import DataError
from simpletuner.reporting.events import Notice
from simpletuner.reporting.webhooks.encoding import IMAGE_BYTES, encode
from simpletuner.reporting.webhooks.images import load_images
from simpletuner.reporting.webhooks.messages import Message, progress_message
from simpletuner.reporting.webhooks.outbox import LatestProgress, Outbox
from simpletuner.reporting.webhooks.spool import Spool, created_at, message_id
from simpletuner.reporting.webhooks.transport import Deadlines, DeliveryFailed, Refused, TooLarge, TooSlow, Transport

if TYPE_CHECKING:
    from tenacity import RetryCallState

# After so many failures a message lets the others pass: it may itself be what the service fails on.
_MAX_TRIES_IN_FRONT = 8
_MIN_IMAGE_BYTES = 16 << 10
_SLOW_IMAGE_BYTES = 512 << 10


@dataclass(frozen=True)
class Patience:
    """Seconds, but for `tries`.

    Args:
        first: pause after the first failure; each further one doubles it. Pauses are random, so that many runs do not
            ask at once.
        longest: no pause is longer.
        tries: failures in a row after which a service counts as down, which is reported.
    """

    first: float = 0.5
    longest: float = 300.0
    tries: int = 5

    def pause(self, state: RetryCallState) -> float:
        """Seconds until the next try; never less than the service asks for."""
        from tenacity import wait_random_exponential

        error = state.outcome.exception() if state.outcome else None
        asked_for = error.retry_after if isinstance(error, DeliveryFailed) else None
        return max(wait_random_exponential(self.first, self.longest)(state), asked_for or 0.0)


@dataclass(frozen=True)
class Timing:
    """Seconds. `progress`: between two reports of progress; `drain`: at the end of a run, for all that waits."""

    deadlines: Deadlines = field(default_factory=Deadlines)
    patience: Patience = field(default_factory=Patience)
    progress: float = 1.0
    drain: float = 10.0


@dataclass
class Delivery:
    """A message that is being sent, and where it came from: a file of the spool, progress, or the outbox."""

    message: Message
    file: str | None = None
    progress: LatestProgress | None = None


class Sender:
    """One service.

    Args:
        name: for notices: `webhook 1 (raw)`.
        names: name and id of the run as they are now; messages of progress carry them.
        notify: called from the background thread.
    """

    def __init__(
        self,
        name: str,
        target: Webhook,
        spool: Spool,
        timing: Timing,
        names: Callable[[], tuple[str, str]],
        notify: Callable[[Notice], None],
        job_id: str | None = None,
    ):
        self.name, self.target, self.outbox, self.spool = name, target, Outbox(), spool
        self._timing, self._names, self._notify, self._job_id = timing, names, notify, job_id
        self._tries: Counter[str] = Counter()
        self._image_bytes = IMAGE_BYTES[target.webhook_type]
        self._ready, self._closing = asyncio.Event(), asyncio.Event()
        self._last_progress = -timing.progress
        self._warned: set[str] = set()
        self._must_wait = False
        self.is_down = False

    def wake(self) -> None:
        """Something was put into the outbox: what must arrive goes to the disk now."""
        self._spool_urgent()
        self._ready.set()

    def close(self) -> None:
        """Send what waits and end; a service that is down gets one more try."""
        self.wake()
        self._closing.set()

    async def run(self) -> None:
        """Send until `close` was called and nothing waits, or the service is down."""
        from tenacity import AsyncRetrying, retry_if_exception_type

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(DeliveryFailed),
            wait=self._timing.patience.pause,
            before_sleep=self._failed,
            stop=lambda state: self.is_down and self._closing.is_set(),
            sleep=self._sleep,
            reraise=True,
        )
        async with Transport(self.target, self._timing.deadlines) as transport:
            try:
                while await retrying(self._send_next, transport):
                    if self.is_down:
                        self.is_down, self._image_bytes = False, IMAGE_BYTES[self.target.webhook_type]
                        self._notify(Notice("info", f"{self.name} works again"))
            except DeliveryFailed:
                return

    async def _send_next(self, transport: Transport) -> bool:
        """Send the next message, as soon as there is one; False at the end, when nothing waits."""
        while True:
            self._ready.clear()
            delivery = self._next_delivery()
            if delivery is not None:
                break
            if self._closing.is_set():
                return False
            await _wait_for(self._ready, self._timing.progress)
        try:
            await self._post(delivery.message, transport)
        except Refused as error:
            self._refused(delivery, error)
        except DeliveryFailed:
            self._put_back(delivery)
            raise
        else:
            self._tries.pop(delivery.message.id, None)
            if delivery.file is not None:
                self.spool.remove(delivery.file)
            elif delivery.progress is None:
                self.outbox.remove(delivery.message)
        return True

    def _next_delivery(self) -> Delivery | None:
        """The oldest of what waits, what failed often behind the rest; progress when nothing else does."""
        self._spool_urgent()
        ordinary = self.outbox.first()
        while (names := self.spool.names()) and (ordinary is None or created_at(names[0]) <= ordinary.created):
            name = min(names, key=lambda each: self._tries[message_id(each)] // _MAX_TRIES_IN_FRONT)
            try:
                message = self.spool.read(name)
            except DataError as error:
                self._notify(Notice("warning", f"{self.name}: {error}"))
                continue
            if message is not None:
                return Delivery(message, name)
        if ordinary is not None:
            return Delivery(ordinary)
        now = asyncio.get_running_loop().time()
        is_due = now - self._last_progress >= self._timing.progress or self._closing.is_set()
        progress = self.outbox.take_progress(only_if_first=True) if is_due else None
        if progress is None:
            return None
        self._last_progress = now
        run_name, run_id = self._names()
        return Delivery(progress_message(progress[0], run_name, progress[1], run_id), progress=progress)

    def _spool_urgent(self) -> None:
        for message in self.outbox.take_urgent():
            try:
                self.spool.add(message)
            except DataError as error:
                self.outbox.put(replace(message, must_arrive=False))
                self._warn_once("disk", f"{self.name}: messages are kept in memory only: {error}")

    async def _post(self, message: Message, transport: Transport) -> None:
        """One try. If the service finds images too large, they are sent smaller at once, and from then on.

        If even the smallest are too large, size is not the problem, and they are sent in full once it works again. No
        answer in time may mean a slow connection: images become smaller then too, down to a limit.
        """
        while True:
            images = load_images(message.images, self._image_bytes)
            try:
                return await transport.post(encode(self.target, message, images, self._job_id), message.id)
            except TooLarge:
                if not message.images:
                    raise
                self._image_bytes //= 4
                if self._image_bytes < _MIN_IMAGE_BYTES:
                    self._image_bytes = IMAGE_BYTES[self.target.webhook_type]
                    raise
            except TooSlow:
                if message.images:
                    smallest = min(self._image_bytes, _SLOW_IMAGE_BYTES)
                    self._image_bytes = max(self._image_bytes // 4, smallest)
                raise

    def _refused(self, delivery: Delivery, error: Refused) -> None:
        if delivery.file is not None:
            self.spool.reject(delivery.file)
            text = f"{self.name}: {delivery.message.title}: {error}; kept in {self.spool.folder}"
            self._notify(Notice("warning", text))
        elif delivery.progress is None:
            self.outbox.remove(delivery.message)

    def _put_back(self, delivery: Delivery) -> None:
        """After a failure. An ordinary message that failed often is dropped."""
        self._tries[delivery.message.id] += 1
        if delivery.progress is not None:
            self.outbox.put_back_progress(*delivery.progress)
        elif delivery.file is None and self._tries[delivery.message.id] >= _MAX_TRIES_IN_FRONT:
            self.outbox.remove(delivery.message)
            self.outbox.dropped += 1

    def _failed(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        self._must_wait = isinstance(error, DeliveryFailed) and bool(error.retry_after)
        if state.attempt_number >= self._timing.patience.tries:
            self.is_down = True
            text = f"{self.name} does not work: {error}. Training continues; checkpoints, images and the end of the run"
            self._warn_once("down", f"{text} are kept in {self.spool.folder} and sent later")

    def _warn_once(self, subject: str, text: str) -> None:
        if subject not in self._warned:
            self._warned.add(subject)
            self._notify(Notice("warning", text))

    async def _sleep(self, seconds: float) -> None:
        """The pause between two tries. The end of a run shortens it, unless the service asked for it."""
        if self._must_wait:
            await asyncio.sleep(seconds)
        elif self._closing.is_set():
            await asyncio.sleep(min(seconds, self._timing.drain / 4))
        else:
            await _wait_for(self._closing, seconds)


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, at most so long."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
