"""Families that follow a flow, and whose scheduler says how far times are shifted for the size of an image."""

from __future__ import annotations

from torch import Tensor

from simpletuner.models.family import ModelFamily


class FlowFamily(ModelFamily):
    """Training times of a family whose model has a `FlowMatchEulerDiscreteScheduler`."""

    def sigmas_at(self, quantiles: Tensor, latents: Tensor) -> Tensor:
        """(B,) logit-normal sigmas, moved by `training_shift`."""
        return self.scheduler_sigmas(quantiles, latents)
