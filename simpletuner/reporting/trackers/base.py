"""What a dashboard has to do, in four methods: the interface of `custom_tracker`, documented in TRACKERS.md.

A tracker is called from a thread of its own (`background.py`), so it may take its time and may wait for a network:
training does not wait for it. It gets plain numbers and paths of images, and needs to know no event.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.reporting.events import SavedImage


@dataclass(frozen=True)
class TrackedRun:
    """The run that a tracker shows.

    Args:
        name: of the run (`tracker_run_name`, else the name of `output_dir`).
        project: `tracker_project_name`, None where not set.
        output_dir: folder of everything that the run writes.
        start_step: optimizer steps already done; 0 for a new run, more for a resumed one.
        total_steps: optimizer steps at which the run ends.
        options: the resolved configuration, secrets left out.
        details: facts worth a line each (model, device, images).
        run_id: of the run, the same at each start of it.
        branch: of the run; another one after it went back to an earlier checkpoint, whose steps come again.
    """

    name: str
    project: str | None
    output_dir: Path
    start_step: int
    total_steps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, str] = field(default_factory=dict)
    run_id: str = ""
    branch: str = ""


class Tracker:
    """Base of trackers; each method does nothing until it is written.

    Whatever a method raises ends the tracker with one warning, and the run continues without it.
    """

    def start(self, run: TrackedRun) -> str | None:
        """The run begins or goes on. A text that is returned is printed in the terminal (an address, a folder)."""
        return None

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Numbers of optimizer step `step` by name (`train/loss`, `loss/val/pooled`, `speed/seconds_per_step`).

        May be called several times for a step, and never for an earlier one.
        """

    def log_images(self, images: Sequence[SavedImage], step: int) -> None:
        """Validation images, as files that stay where they are."""
        # Trackers written for the first version have the method under its old name.
        if (log_pictures := getattr(self, "log_pictures", None)) is not None:
            log_pictures(images, step)

    def finish(self, exit_code: int) -> None:
        """The run ended: 0 as planned, else the exit code of the program. Not called after a failure."""
