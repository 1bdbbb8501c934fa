"""Where a run stands: all that a checkpoint keeps beside weights, optimizer state and EMA, and nothing else.

Order of the data, noise, timesteps and schedules are pure functions of this and the configuration, so there is no
generator, sampler or scheduler state to save.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from simpletuner.training.loss_scale import LossScale


@dataclass
class Progress:
    """Where a run stands, always at the start of an accumulation window.

    Args:
        global_step: optimizer steps taken.
        epoch: 0-based epoch of the next micro-batch.
        position: index of the next global micro-batch within that epoch.
        loss_scale: of the next step.
        eval_losses: global_step -> pooled eval loss, of earlier processes too.
    """

    global_step: int = 0
    epoch: int = 0
    position: int = 0
    loss_scale: LossScale = field(default_factory=lambda: LossScale(is_active=False))
    eval_losses: dict[int, float] = field(default_factory=dict)

    def place(self) -> dict[str, int]:
        """The three integers, as a checkpoint keeps them."""
        return {"global_step": self.global_step, "epoch": self.epoch, "position": self.position}

    @classmethod
    def at(cls, place: Mapping[str, Any]) -> Progress:
        """What `place` gave; versions before 0.2 kept `skipped_steps` there too."""
        return cls(place["global_step"], place["epoch"], place["position"])
