"""The smooth L1 error: like the Huber error, but a large difference counts the same whatever the turning point."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from simpletuner.models.family import ModelFamily
from simpletuner.training.losses.huber import Huber, pseudo_huber


@dataclass(frozen=True)
class SmoothL1(Huber):
    """`2 (sqrt(d^2 + c^2) - c)`, with the c of the Huber error."""

    def errors(self, family: ModelFamily, model_pred: Tensor, target: Tensor, sigmas: Tensor) -> Tensor:
        return 2 * pseudo_huber(model_pred, target, self.limits(family, sigmas))
