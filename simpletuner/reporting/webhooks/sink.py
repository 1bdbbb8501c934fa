"""The sink that tells services: `handle` puts an event where a background thread finds it, and returns."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from simpletuner.config.webhooks import Webhook, Webhooks
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
from simpletuner.reporting.webhooks.outbox import Outbox
from simpletuner.reporting.webhooks.sender import Sender, Timing
from simpletuner.reporting.webhooks.spool import Spool

# In the output folder: what must arrive and has not.
SPOOL_FOLDER = "webhooks"


class WebhookSink:
    """Tells all services of a run, from one daemon thread.

    Args:
        webhooks: the services, with their secrets.
        output_dir: messages that must arrive wait in `webhooks/` in it.
        run_name: what the run is called before it says so itself; unset: the name of `output_dir`.
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
        self._is_new = is_new
        self._senders = [
            self._sender(number, target, Path(output_dir), webhooks.job_id)
            for number, target in enumerate(webhooks.targets, 1)
        ]
        self._loop, self._closed = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._work, name="webhooks", daemon=True)
        self._thread.start()

    def handle(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._report_step(event)
        elif isinstance(event, PhaseProgress):
            for sender in self._senders:
                if sender.target.webhook_type == "raw" and sender.target.log_level in ("debug", "info"):
                    sender.outbox.put_progress(event)
        else:
            self._report(event)

    def take_notices(self) -> list[Notice]:
        taken = []
        while self._notices:
            taken.append(self._notices.popleft())
        return taken

    def close(self) -> None:
        """Wait until everything is sent, within the seconds of `drain`, and say what was not."""
        if self._loop.is_closed() or not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._begin_closing)
        # Requests end when the deadline cancels them; the rest is for a write to a slow disk.
        self._thread.join(self._timing.drain + 5.0)
        for sender in self._senders:
            self._summarise(sender)

    def _sender(self, number: int, target: Webhook, output_dir: Path, job_id: str | None) -> Sender:
        # By place and type, not by address: a service whose address was fixed gets what waits for it.
        spool = Spool(output_dir / SPOOL_FOLDER / f"{number}-{target.webhook_type}", output_dir, self._is_new)
        name = f"webhook {number} ({target.webhook_type})"
        return Sender(name, target, Outbox(), spool, self._timing, self._names, self._notices.append, job_id)

    def _names(self) -> tuple[str, str]:
        return self._run_name, self._run_id

    def _report_step(self, event: StepDone) -> None:
        is_due = self._interval is None or event.step % self._interval == 0 or event.step == event.total_steps
        for sender in self._senders:
            is_wanted = self._interval is not None or sender.target.webhook_type == "raw"
            if is_wanted and sender.target.log_level in ("debug", "info"):
                sender.outbox.put_progress(event, is_due)

    def _report(self, event: Event) -> None:
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
            self._loop.call_soon_threadsafe(self._notify)

    def _flush_progress(self) -> None:
        """The last step is reported before the end is."""
        for sender in self._senders:
            while (progress := sender.outbox.take_progress()) is not None:
                sender.outbox.put(progress_message(progress[0], self._run_name, progress[1], self._run_id))

    # ---- in the background thread ----

    def _work(self) -> None:
        with self._reported_fault():
            self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        tasks = [asyncio.create_task(sender.run()) for sender in self._senders]
        done = asyncio.gather(*tasks)
        closing = asyncio.create_task(self._cancel_late(done))
        try:
            await done
        except asyncio.CancelledError:
            pass
        finally:
            closing.cancel()

    async def _cancel_late(self, done: asyncio.Future[list[None]]) -> None:
        await self._closed.wait()
        is_hopeless = all(sender.is_down for sender in self._senders)
        await asyncio.sleep(self._timing.drain / 3 if is_hopeless else self._timing.drain)
        done.cancel()

    def _notify(self) -> None:
        for sender in self._senders:
            sender.notify()

    def _begin_closing(self) -> None:
        self._closed.set()
        for sender in self._senders:
            sender.close()

    def _summarise(self, sender: Sender) -> None:
        kept, lost = len(sender.spool.names()), sender.outbox.dropped + len(sender.outbox)
        parts = [f"{kept} kept in {sender.spool.folder} for the next start"] if kept else []
        parts += [f"{lost} lost"] if lost else []
        if parts:
            self._notices.append(Notice("warning", f"{sender.name}: messages that were not sent: {', '.join(parts)}"))

    @contextmanager
    def _reported_fault(self) -> Iterator[None]:
        """A mistake in the sender ends the webhooks, not the run: its traceback is printed, and the run is reported."""
        ended = False
        try:
            yield
            ended = True
        finally:
            if not ended:
                self._notices.append(Notice("error", "the webhooks stopped working: a fault of simpletuner"))
