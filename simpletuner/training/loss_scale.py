"""Loss scaling for float16, whose smallest numbers are too large for many gradients.

The loss is multiplied before the backward pass and the gradients are divided after it. Where a gradient overflows, the
step is left out and the scale is halved; after many good steps it is doubled. Micikevicius et al., "Mixed Precision
Training" (arXiv 1710.03740), section 3.2; the numbers are those of torch's `GradScaler`. A checkpoint keeps the state,
two numbers, so a resumed run scales as the undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

GROWTH_INTERVAL = 2000
SMALLEST, LARGEST = 1.0, 2.0**24


@dataclass
class LossScale:
    """How the loss of a run is scaled; a factor of 1 that never changes where nothing has to be scaled.

    Args:
        is_active: mixed_precision is fp16.
        scale: the factor.
        good_steps: steps in a row without an overflow.
    """

    is_active: bool
    scale: float = 1.0
    good_steps: int = 0

    @classmethod
    def of(cls, mixed_precision: str) -> LossScale:
        return cls(True, 2.0**16) if mixed_precision == "fp16" else cls(False)

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale, in place."""
        grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.is_active and grads:
            torch._foreach_div_(grads, self.scale)

    def update(self, is_finite: bool) -> bool:
        """After a step; returns whether the scale was the reason for gradients that are not finite."""
        if not self.is_active:
            return False
        if is_finite:
            self.good_steps += 1
            if self.good_steps >= GROWTH_INTERVAL:
                self.scale, self.good_steps = min(self.scale * 2, LARGEST), 0
            return False
        can_fall = self.scale > SMALLEST
        self.scale, self.good_steps = max(self.scale / 2, SMALLEST), 0
        return can_fall

    def to_json(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_json(self, saved: dict[str, float]) -> None:
        """Go on where a checkpoint stood; a run that scales no more takes nothing."""
        if self.is_active:
            self.scale, self.good_steps = float(saved["scale"]), int(saved["good_steps"])
