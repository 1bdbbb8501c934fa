"""Weights & Biases: numbers, images and the resolved configuration, online or offline (`WANDB_MODE=offline`).

A resumed run is the same run there: its id is kept in `output_dir/wandb_run.json`. Steps that are taken again
after a kill are left out, as they have the very numbers that W&B holds already. A run that went back to an earlier
checkpoint takes steps with other numbers: its new branch is a run of its own there, in the same group.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner import storage
from simpletuner.errors import DataError
from simpletuner.reporting.events import SavedImage
from simpletuner.reporting.scalars import image_name
from simpletuner.reporting.trackers.base import TrackedRun, Tracker

if TYPE_CHECKING:
    import wandb

RUN_FILE = "wandb_run.json"
DEFAULT_PROJECT = "simpletuner"
FINISH_SECONDS = 45.0


class WandbTracker(Tracker):
    """One run of W&B."""

    def __init__(self) -> None:
        self._run: wandb.Run | None = None
        self._first_step = 0

    def start(self, run: TrackedRun) -> str:
        import wandb

        # W&B reports its own failures through `logging` and the terminal; ours are reported as notices.
        logging.getLogger("wandb").setLevel(logging.ERROR)
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            save_code=False,
            # It would hold the command line, and with it whatever secret was given there.
            x_disable_meta=True,
            finish_timeout=FINISH_SECONDS,
        )
        self._run = wandb.init(
            project=run.project or DEFAULT_PROJECT,
            name=run.name,
            id=tracked_id(run),
            group=run.run_id or None,
            resume="allow",
            dir=run.output_dir,
            config={**run.options, "run": dict(run.details)},
            settings=settings,
        )
        self._first_step = self._run.step
        if self._run.settings.mode in ("offline", "dryrun"):
            return f"offline; to upload it: wandb sync {Path(self._run.dir).parent}"
        return self._run.url or ""

    def log_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        assert self._run is not None
        if step >= self._first_step:
            self._run.log(dict(scalars), step=step)

    def log_images(self, images: Sequence[SavedImage], step: int) -> None:
        import wandb

        assert self._run is not None
        if step >= self._first_step:
            logged = {
                f"pictures/{image_name(image)}": wandb.Image(str(image.path), caption=image.prompt or None)
                for image in images
            }
            self._run.log(logged, step=step)

    def finish(self, exit_code: int) -> None:
        assert self._run is not None
        self._run.finish(exit_code=exit_code)


def tracked_id(run: TrackedRun) -> str:
    """The id of a run in W&B: that of its branch, where it is kept, or a new one that is kept from now on.

    A note without a branch is that of an earlier version, whose runs had one only.
    """
    path = run.output_dir / RUN_FILE
    made = secrets.token_hex(4)
    if run.start_step > 0 and path.is_file():
        try:
            noted = storage.read_json(path, dict)
            if noted.get("branch", run.branch) == run.branch:
                made = str(noted["id"])
        except (DataError, KeyError, TypeError, AttributeError):
            pass  # a damaged note costs the connection to the old curve only, and a new run is made
    storage.write_json(path, {"id": made, "run": run.run_id, "branch": run.branch})
    return made
