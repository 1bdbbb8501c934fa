"""The squared error: what the papers of diffusion and flow models minimize."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from simpletuner.models.family import ModelFamily
from simpletuner.training.losses.base import Loss


@dataclass(frozen=True)
class L2(Loss):
    """d^2, for a difference d."""

    def errors(self, family: ModelFamily, model_pred: Tensor, target: Tensor, sigmas: Tensor) -> Tensor:
        return squared_error(model_pred, target)


def squared_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """Element-wise squared error in float32, whatever the inputs' dtype."""
    return (model_pred.float() - target.float()).square()
