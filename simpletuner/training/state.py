"""All that a resume needs to know of where a run stands, and nothing else.

Order of the data, noise, timesteps and schedules are pure functions of these integers and the configuration, so there
is no generator, sampler or scheduler state to save.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Where a run stands, always at the start of an accumulation window.

    Args:
        global_step: optimizer steps taken.
        epoch: 0-based epoch of the next micro-batch.
        position: index of the next global micro-batch within that epoch.
        skipped_steps: optimizer steps dropped in a row because loss or gradients were not finite; of this process, for
            a resume begins to count again.
    """

    global_step: int = 0
    epoch: int = 0
    position: int = 0
    skipped_steps: int = 0

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "skipped_steps"}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainState:
        """Versions before 0.2 kept `skipped_steps` too."""
        return cls(**{key: value for key, value in data.items() if key != "skipped_steps"})
