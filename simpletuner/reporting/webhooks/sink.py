"""The sink for webhooks: `handle` puts an event where a background thread finds it, and returns."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from pathlib import Path

from simpletuner.config.webhooks import Webhooks
from simpletuner.reporting.events import (
    Event,
    Notice,
    PhaseDone,
    PhaseProgress,
    RunFailed,
    RunFinished,
    RunStarted,
    StepDone,
)
from simpletuner.reporting.webhooks.encoding import accepts
from simpletuner.reporting.webhooks.messages import progress_message, words_for
from simpletuner.reporting.webhooks.sender import Sender, Timing
from simpletuner.reporting.webhooks.spool import Spool

# In the output folder: what must arrive and has not.
SPOOL_FOLDER = "webhooks"


class WebhookSink:
    """Reports to all services of a run, from one daemon thread.

    Args:
        webhooks: the services, with their secrets.
        output_dir: messages that must arrive wait in `webhooks/` in it.
        run_name: what the run is called until its start says so; unset: the name of `output_dir`.
        is_new: a new run begins: messages of an earlier one in its folder are not sent with its own.
    """

    name = "webhooks"
    failures: tuple[type[Exception], ...] = ()

    def __init__(
        self,
        webhooks: Webhooks,
        output_dir: Path,
        timing: Timing | None = None,
        run_name: str | None = None,
        is_new: bool = False,
    ):
        self._timing = timing or Timing()
        self._interval = webhooks.reporting_interval
        self._run_name, self._run_id = run_name or Path(output_dir).name, ""
        self._notices: deque[Notice] = deque()
        self._senders = []
        for number, target in enumerate(webhooks.targets, 1):
            # By position and type, not by address: a service whose address was corrected gets what waits for it.
            folder = Path(output_dir) / SPOOL_FOLDER / f"{number}-{target.webhook_type}"
            spool = Spool(folder, Path(output_dir), is_new)
            name = f"webhook {number} ({target.webhook_type})"
            arguments = (lambda: (self._run_name, self._run_id), self._notices.append, webhooks.job_id)
            self._senders.append(Sender(name, target, spool, self._timing, *arguments))
        self._loop, self._closed = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._work, name="webhooks", daemon=True)
        self._thread.start()

    def handle(self, event: Event) -> None:
        if isinstance(event, StepDone | PhaseProgress):
            self._put_progress(event)
            return
        if isinstance(event, RunStarted):
            self._run_name, self._run_id = event.run_name, event.run_id
        if isinstance(event, RunFinished | RunFailed):
            self._flush_progress()
        messages = words_for(event, self._run_name, self._run_id)
        for sender in self._senders:
            if isinstance(event, PhaseDone):
                sender.outbox.drop_phase_progress()
            for message in messages:
                if accepts(sender.target, message):
                    sender.outbox.put(message)
        if messages and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._wake)

    def take_notices(self) -> list[Notice]:
        return [self._notices.popleft() for _ in range(len(self._notices))]

    def close(self) -> None:
        """Wait until everything is sent, within the seconds of `drain`, and report what was not."""
        if self._loop.is_closed() or not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._begin_closing)
        # Requests end when the deadline cancels them; the rest is for a write to a slow disk.
        self._thread.join(self._timing.drain + 5.0)
        for sender in self._senders:
            kept, lost = len(sender.spool.names()), sender.outbox.dropped + len(sender.outbox)
            parts = [f"{kept} kept in {sender.spool.folder} for the next start"] if kept else []
            parts += [f"{lost} lost"] if lost else []
            if parts:
                text = f"{sender.name}: messages that were not sent: {', '.join(parts)}"
                self._notices.append(Notice("warning", text))

    def _put_progress(self, event: StepDone | PhaseProgress) -> None:
        """Programs get all progress; people in Discord only each `webhook_reporting_interval` steps."""
        interval, is_step = self._interval, isinstance(event, StepDone)
        is_due = True
        if isinstance(event, StepDone) and interval is not None:
            is_due = event.step % interval == 0 or event.step == event.total_steps
        for sender in self._senders:
            is_wanted = sender.target.webhook_type == "raw" or (is_step and interval is not None)
            if is_wanted and sender.target.log_level in ("debug", "info"):
                sender.outbox.put_progress(event, is_due)

    def _flush_progress(self) -> None:
        """The last step is reported before the end is."""
        for sender in self._senders:
            while (progress := sender.outbox.take_progress()) is not None:
                sender.outbox.put(progress_message(progress[0], self._run_name, progress[1], self._run_id))

    # ---- in the background thread ----

    def _work(self) -> None:
        """A mistake in the sender ends the webhooks, not the run: its traceback is printed, and the run warns."""
        try:
            self._loop.run_until_complete(self._run())
        except BaseException:
            self._notices.append(Notice("error", "the webhooks stopped working: a fault of simpletuner"))
            raise
        finally:
            self._loop.close()

    async def _run(self) -> None:
        done = asyncio.gather(*(sender.run() for sender in self._senders))
        closing = asyncio.create_task(self._cancel_late(done))
        with contextlib.suppress(asyncio.CancelledError):
            await done
        closing.cancel()

    async def _cancel_late(self, done: asyncio.Future[list[None]]) -> None:
        await self._closed.wait()
        is_hopeless = all(sender.is_down for sender in self._senders)
        await asyncio.sleep(self._timing.drain / 3 if is_hopeless else self._timing.drain)
        done.cancel()

    def _wake(self) -> None:
        for sender in self._senders:
            sender.wake()

    def _begin_closing(self) -> None:
        self._closed.set()
        for sender in self._senders:
            sender.close()
