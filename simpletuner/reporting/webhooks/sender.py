"""Brings the messages of one outbox to its service, one at a time and in order, for as long as it takes.

Runs inside the event loop of the background thread. What must arrive goes to the disk at once, also while a request is
under way, and leaves it when the service has answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from simpletuner.config.webhooks import Webhook
from simpletuner.errors import DataError
from simpletuner.reporting.events import Notice, PhaseProgress, StepDone
from simpletuner.reporting.webhooks.breaker import Breaker, Patience
from simpletuner.reporting.webhooks.encoding import IMAGE_BYTES, Body, encode
from simpletuner.reporting.webhooks.images import load_images
from simpletuner.reporting.webhooks.messages import CurvePoint, Message, progress_message
from simpletuner.reporting.webhooks.outbox import Outbox
from simpletuner.reporting.webhooks.spool import REFUSED, Spool, created_at, message_id
from simpletuner.reporting.webhooks.transport import Deadlines, Outcome, Reply, Transport

Emit = Callable[[Notice], None]

# A message on whose account a service failed this often lets the next ones pass.
_TRIES_IN_FRONT = 8
_SMALLEST_IMAGE_BYTES = 16 << 10
_NARROW_IMAGE_BYTES = 512 << 10


@dataclass(frozen=True)
class Timing:
    """Seconds. `progress`: between two reports of progress; `drain`: at the end of a run, for all that waits."""

    deadlines: Deadlines = field(default_factory=Deadlines)
    patience: Patience = field(default_factory=Patience)
    progress: float = 1.0
    drain: float = 10.0


@dataclass
class Job:
    """A message that is being sent, and where it came from."""

    message: Message
    name: str | None = None
    progress: tuple[StepDone | PhaseProgress, list[CurvePoint]] | None = None


class Sender:
    """One service.

    Args:
        name: for notices: `webhook 1 (raw)`.
        names: name and id of the run as they are now; messages of progress carry them.
        tell: called from the background thread.
    """

    def __init__(
        self,
        name: str,
        target: Webhook,
        outbox: Outbox,
        spool: Spool,
        timing: Timing,
        names: Callable[[], tuple[str, str]],
        report: Emit,
        job_id: str | None = None,
    ):
        self.name, self.target, self.outbox, self.spool = name, target, outbox, spool
        self._timing, self._names, self._report, self._job_id = timing, names, report, job_id
        self._breaker = Breaker(timing.patience)
        self._tries: dict[str, int] = {}
        self._image_bytes = IMAGE_BYTES[target.webhook_type]
        self._ready, self._closing = asyncio.Event(), asyncio.Event()
        self._last_progress = -timing.progress
        self._has_warned = self._has_reported_disk = False
        self.delivered = 0

    @property
    def is_down(self) -> bool:
        """Whether the service counts as down."""
        return self._breaker.is_open

    def notify(self) -> None:
        """Something was put into the outbox: what must arrive goes to the disk now."""
        self._keep_urgent()
        self._ready.set()

    def _keep_urgent(self) -> None:
        for message in self.outbox.take_urgent():
            try:
                self.spool.add(message)
            except DataError as error:
                self.outbox.put(replace(message, must_arrive=False))
                self._report_disk(error)

    def close(self) -> None:
        """Send what waits and end; a service that is down gets one more try."""
        self.notify()
        self._closing.set()

    async def run(self) -> None:
        """Send until `close` was called and nothing waits."""
        transport = Transport(self.target, self._timing.deadlines)
        try:
            while True:
                self._ready.clear()
                job = self._next_job()
                if job is not None:
                    if not await self._send(job, transport) and self._closing.is_set() and self._breaker.is_open:
                        return
                elif self._closing.is_set():
                    return
                else:
                    await _wait_for(self._ready, self._timing.progress)
        finally:
            await transport.close()

    def _next_job(self) -> Job | None:
        """The oldest of what waits, what failed often behind the rest; progress when nothing else does."""
        self._keep_urgent()
        ordinary = self.outbox.first()
        names = self.spool.names()
        if names and (ordinary is None or created_at(names[0]) <= ordinary.created):
            name = min(names, key=lambda each: self._tries.get(message_id(each), 0) // _TRIES_IN_FRONT)
            message = self.spool.read(name)
            if message is None and not (self.spool.folder / REFUSED / name).exists():
                return self._next_job()
            if message is None:
                self._report(Notice("warning", f"{self.name}: {name} cannot be read; skipped in {self.spool.folder}"))
                return self._next_job()
            return Job(message, name)
        if ordinary is not None:
            return Job(ordinary)
        now = asyncio.get_running_loop().time()
        is_due = now - self._last_progress >= self._timing.progress or self._closing.is_set()
        progress = self.outbox.take_progress() if is_due else None
        if progress is None:
            return None
        self._last_progress = now
        run_name, run_id = self._names()
        return Job(progress_message(progress[0], run_name, progress[1], run_id), progress=progress)

    async def _send(self, job: Job, transport: Transport) -> bool:
        """One try; True where the message is out of the way."""
        reply = await transport.post(self._body(job.message), job.message.id)
        if reply.outcome == "delivered":
            self._delivered(job)
            return True
        if reply.outcome == "refused":
            self._refused(job, reply)
            return True
        if job.progress is not None:
            self.outbox.put_back_progress(*job.progress)
        if job.message.images and self._shrink_images(reply.outcome):
            return False
        await self._pause(job, reply)
        return False

    def _body(self, message: Message) -> Body:
        attachments = load_images(message.images, self._image_bytes)
        return encode(self.target, message, attachments, self._job_id)

    def _shrink_images(self, outcome: Outcome) -> bool:
        """After 413, a quarter of the bytes from now on; returns whether to try at once. Where even the smallest are
        too large, size is not the matter, and a service that works again gets them whole.

        No answer in time may mean that the way there is narrow: they become smaller then too, to a point.
        """
        smaller = self._image_bytes // 4
        if outcome == "too slow":
            self._image_bytes = max(smaller, min(self._image_bytes, _NARROW_IMAGE_BYTES))
        elif outcome == "too large":
            is_worth_a_try = smaller >= _SMALLEST_IMAGE_BYTES
            self._image_bytes = smaller if is_worth_a_try else IMAGE_BYTES[self.target.webhook_type]
            return is_worth_a_try
        return False

    def _delivered(self, job: Job) -> None:
        self.delivered += 1
        self._tries.pop(job.message.id, None)
        if job.name is not None:
            self.spool.remove(job.name)
        elif job.progress is None:
            self.outbox.remove(job.message)
        if self._breaker.worked():
            self._image_bytes = IMAGE_BYTES[self.target.webhook_type]
            self._report(Notice("info", f"{self.name} works again"))

    def _refused(self, job: Job, reply: Reply) -> None:
        self._breaker.worked()
        if job.name is not None:
            self.spool.skipped(job.name)
            self._report(
                Notice("warning", f"{self.name}: {job.message.title}: {reply.reason}; kept in {self.spool.folder}")
            )
        elif job.progress is None:
            self.outbox.remove(job.message)

    async def _pause(self, job: Job, reply: Reply) -> None:
        tries = self._tries[job.message.id] = self._tries.get(job.message.id, 0) + 1
        if tries >= _TRIES_IN_FRONT and job.name is None:
            self._give_up(job)
        pause = self._breaker.failed(reply.retry_after)
        if self._breaker.is_open and not self._has_warned:
            self._has_warned = True
            text = f"{self.name} does not work: {reply.reason}. Training goes on; checkpoints, images and the end of"
            self._report(Notice("warning", f"{text} the run are kept in {self.spool.folder} and sent later"))
        if reply.retry_after:  # what a service asks for is kept, also at the end
            await asyncio.sleep(pause)
        elif self._closing.is_set():
            await asyncio.sleep(min(pause, self._timing.drain / 4))
        else:
            await _wait_for(self._closing, pause)

    def _give_up(self, job: Job) -> None:
        """An ordinary message that may itself be what the service stumbles over."""
        if job.progress is None:
            self.outbox.remove(job.message)
            self.outbox.dropped += 1
        self._tries.pop(job.message.id, None)

    def _report_disk(self, error: DataError) -> None:
        if not self._has_reported_disk:
            self._has_reported_disk = True
            self._report(Notice("warning", f"{self.name}: messages are kept in memory only: {error}"))


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, at most so long."""
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
