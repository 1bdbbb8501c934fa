"""Whether the other processes of a run still live, though their connections say nothing.

A process that is frozen, or a network that drops without a reset, closes no connection: who waits for it would wait for
days. So each process counts in the store of the run, and looks at the others' counters. A process that works, however
long, goes on counting; one whose counter stands still for `distributed_timeout` is given up.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from simpletuner.distributed.frozen import address, is_frozen_at
from simpletuner.distributed.launcher import leave_last_words
from simpletuner.errors import EXIT_DATA, Interrupted, Problem, SimpleTunerError

BEAT_SECONDS = 2.0
# Without a sign for so long, a process is not waited for by one that is asked to stop.
QUIET_SECONDS = 10.0
# For the main thread to say it itself; one that waits inside of a library is ended.
LAST_SECONDS = 15.0


class PeerLost(SimpleTunerError):
    """Another process of the run gives no sign any more."""

    exit_code = EXIT_DATA


@dataclass(eq=False)
class Heartbeat:
    """Counts for this process and watches the others, in threads.

    Args:
        rank: this process.
        size: all of them.
        limit: seconds without a sign after which a process is given up.
        stopping: the error to leave with where a signal has come, None where none has.
    """

    rank: int
    size: int
    limit: float
    stopping: Callable[[], Interrupted | None] = lambda: None
    waits_in: str = ""
    _seen: dict[int, tuple[bytes, float]] = field(default_factory=dict)
    _addresses: dict[int, str] = field(default_factory=dict)
    _answered: float = 0.0
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self, store: Any) -> None:
        """Begin, with a connection to the run's store that is this object's own."""
        self._answered = now = time.monotonic()
        self._seen = {rank: (b"", now) for rank in range(self.size) if rank != self.rank}
        with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
            store = store.clone()
        for work in (self._count, self._end_if_lost):
            threading.Thread(target=work, args=(store,), name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._ended.set()

    def quiet(self, seconds: float) -> list[int]:
        """Processes that have given no sign for so long; the one that keeps the store where that does not answer."""
        now = time.monotonic()
        if now - self._answered > seconds:
            return [0] if self.rank != 0 else []
        return [rank for rank, (_, since) in self._seen.items() if now - since > seconds]

    def check(self) -> None:
        """Called by a thread that waits for the others.

        Raises:
            PeerLost: one of them is given up.
            Interrupted: a signal came, and one of them gives no sign: it would be waited for in vain.
        """
        if lost := self.quiet(self.limit):
            raise PeerLost(self.problem(lost))
        error = self.stopping()
        if error is not None and (self.quiet(min(QUIET_SECONDS, self.limit)) or self.frozen()):
            raise error

    def frozen(self) -> list[int]:
        """Processes of this machine that are stopped or gone."""
        return [rank for rank, place in self._addresses.items() if is_frozen_at(place)]

    def problem(self, lost: list[int]) -> Problem:
        who = ", ".join(map(str, lost))
        where = f" in {self.waits_in}" if self.waits_in else ""
        return Problem(
            f"process {who} of {self.size} has not responded for {self.limit / 60:g} minutes; process {self.rank} "
            f"waited for it{where}",
            key="distributed_timeout",
            fix="check its machine and the network between them, then start again: the run continues from its last "
            "checkpoint",
        )

    def _count(self, store: Any) -> None:
        beats = 0
        with contextlib.suppress(RuntimeError):
            store.set(f"address-{self.rank}", address())
        while not self._ended.wait(min(BEAT_SECONDS, self.limit / 4)):
            beats += 1
            with contextlib.suppress(RuntimeError):  # it does not answer: `_answered` grows old
                store.set(f"beat-{self.rank}", str(beats))
                for rank, (count, _) in list(self._seen.items()):
                    key = f"beat-{rank}"
                    if store.check([key]) and (now := store.get(key)) != count:
                        self._seen[rank] = (now, time.monotonic())
                    if rank not in self._addresses and store.check([f"address-{rank}"]):
                        self._addresses[rank] = store.get(f"address-{rank}").decode()
                self._answered = time.monotonic()

    def _end_if_lost(self, store: Any) -> None:
        """End a process whose main thread waits inside of a library, where no check of ours is made."""
        while not self._ended.wait(BEAT_SECONDS):
            if self.quiet(self.limit) and self._ended.wait(LAST_SECONDS) is False and (lost := self.quiet(self.limit)):
                text = PeerLost(self.problem(lost)).render()
                if not leave_last_words(text, os.environ):
                    with contextlib.suppress(OSError):  # a terminal that is gone
                        print(text, file=sys.stderr, flush=True)
                os._exit(EXIT_DATA)


def store_of_run() -> Any:
    """The store in which the processes have found each other, under names of our own."""
    import torch.distributed as dist

    store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore("simpletuner-heartbeat", store)


def wait_for(work: Any, heartbeat: Heartbeat, where: str) -> None:
    """Wait for a collective of gloo, answering signals and looking at the others meanwhile.

    Raises:
        PeerLost, Interrupted: as `Heartbeat.check`.
        RuntimeError: the connection broke.
    """
    started = time.monotonic()
    heartbeat.waits_in = where
    while not work.is_completed():
        waited = time.monotonic() - started
        if waited > BEAT_SECONDS or heartbeat.stopping() is not None:
            heartbeat.check()
        # Most waits are over in a moment; a long one shall cost nothing.
        time.sleep(0.0 if waited < 0.002 else 0.0005 if waited < 0.1 else 0.01)
    heartbeat.waits_in = ""
    work.wait(timedelta(seconds=60))
