"""One process of a run: where it writes, who listens to it, what may stop it, and who else there is."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice
from simpletuner.training.phases import Phase, phase
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest


@dataclass(kw_only=True)
class Process:
    """What the parts of a run share, from the reading of its data on.

    Args:
        guard: of the output folder, made while its lock is held: from then on it is the run's.
        process_group: the processes of the run.
    """

    guard: FolderGuard
    bus: EventBus
    stop: StopRequest
    process_group: ProcessGroup = SINGLE_PROCESS

    @property
    def output_dir(self) -> Path:
        return self.guard.output_dir

    def inform(self, text: str) -> None:
        """Log one line."""
        self.bus.emit(Notice("info", text))

    def warn(self, text: str) -> None:
        """Log one line that somebody should read."""
        self.bus.emit(Notice("warning", text))

    def phase(self, name: str, total: int | None = None) -> AbstractContextManager[Phase]:
        """A stretch of work, reported as it begins and ends."""
        return phase(self.bus, name, total)
