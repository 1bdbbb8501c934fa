"""Steps that train nothing: a loss or gradient of exactly 0 for many steps is a warning, with its probable reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner.batch import Batch

# A chance zero does not last so long; a shorter run is judged by all of its steps.
MANY_STEPS = 10


@dataclass
class ZeroWatch:
    """Counts steps in a row, of this process, whose loss or gradient is exactly 0; warns once for each such stretch."""

    zeros: int = 0
    steps: int = 0

    def add(
        self, loss: float, grad_norm: float, batches: Sequence[Batch], mixed_precision: str, is_last: bool
    ) -> str | None:
        """Count one step.

        Args:
            grad_norm: before clipping.
            batches: of this step.
            is_last: no step follows.

        Returns:
            The warning, where there is one.
        """
        self.steps += 1
        if loss and grad_norm:
            self.zeros = 0
            return None
        self.zeros += 1
        if self.zeros == MANY_STEPS or (is_last and self.zeros == self.steps and self.steps < MANY_STEPS):
            what = (
                "loss and gradient were" if not loss and not grad_norm else f"the {'gradient' if loss else 'loss'} was"
            )
            return (
                f"{what} exactly 0 for {self.zeros} steps in a row: {probable_reason(loss, batches, mixed_precision)}"
            )
        return None


def probable_reason(loss: float, batches: Sequence[Batch], mixed_precision: str) -> str:
    """Why a step trains nothing, from what it was made of."""
    if all(batch.masks is not None and not bool((batch.masks > 0).any()) for batch in batches):
        return "the masks of these images leave nothing to train on; check the masks"
    if all(batch.is_regularisation for batch in batches):
        return "these images are regularization data, whose target is what the base model predicts; add training images"
    if loss and mixed_precision == "fp16":
        return "the gradients are too small for fp16; use mixed_precision bf16"
    if loss:
        return "no trained weight changes the prediction; check the adapter's settings"
    return "the prediction is the target already; check the data and init_lora"
