"""What is saved, when, and how a run continues."""

from __future__ import annotations

from pathlib import Path

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, FilePath, Int, Text


class CheckpointOptions(OptionGroup):
    """Checkpoints"""

    output_dir: FilePath = option(
        Path("simpletuner-results"),
        help="Folder for checkpoints, images, logs and the final weights.",
        level="basic",
        path="output",
    )
    checkpoint_step_interval: Int = option(
        500, help="Save every n steps; 0 only at the end.", unit="optimizer steps", ge=0, level="basic"
    )
    checkpoint_epoch_interval: Int | None = option(None, help="Save every n epochs.", unit="epochs", ge=1)
    checkpoints_total_limit: Int | None = option(
        5,
        help="Number of checkpoints to keep; the oldest is deleted after a new one is complete. 0 or unset keeps all.",
        unit="checkpoints",
        ge=0,
        level="basic",
    )
    pause_on_full_disk: Bool = option(
        False,
        help="Where a checkpoint finds no room on the disk, wait until there is, with a message to the webhooks. "
        "Otherwise the run ends with exit code 3 after a second try.",
    )
    resume_from_checkpoint: Text = option(
        "latest",
        takes="latest, none, or a checkpoint's name or path",
        help="`latest` continues from this run's newest valid checkpoint in `output_dir` and starts again where there "
        "is none; a checkpoint's name or path continues from it; `none` or an empty text starts again. What another "
        "run has in the folder, or this one after the named checkpoint, is moved to `earlier-runs/`.",
        level="basic",
        empty_is_value=True,
    )
    checkpointing_rolling_steps: Int = option(
        0, help="Save a rolling checkpoint every n steps.", planned="use checkpoint_step_interval", ge=0
    )
    checkpoints_rolling_total_limit: Int = option(
        1, help="Number of rolling checkpoints to keep.", planned="use checkpoints_total_limit", ge=1
    )

    @property
    def resumes(self) -> bool:
        """Whether a checkpoint is to be continued, if there is one."""
        return self.resume_from_checkpoint.strip().lower() not in ("", "none")
