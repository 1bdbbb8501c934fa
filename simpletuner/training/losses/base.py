"""What a loss is, and what it is computed on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from simpletuner.batch import Conditioning
from simpletuner.config.losses import LOSSES
from simpletuner.config.options.objective import ObjectiveOptions
from simpletuner.diffusion.loss import sample_means
from simpletuner.importing import import_class
from simpletuner.models.family import ModelFamily

if TYPE_CHECKING:
    pass


class Loss(ABC):
    """The error of a prediction.

    A subclass is a frozen dataclass. Its fields are the options that it reads, under their own names.
    """

    @abstractmethod
    def errors(self, family: ModelFamily, model_pred: Tensor, target: Tensor, sigmas: Tensor) -> Tensor:
        """(B, C, h, w) float32 error of each element.

        Args:
            family: `family.signal_and_noise(sigmas)` says how much data and noise the denoiser saw.
            model_pred: (B, C, h, w).
            target: (B, C, h, w).
            sigmas: (B,) in [0, 1]; 0 is data.
        """


def build_loss(options: ObjectiveOptions) -> Loss:
    """The loss of a configuration."""
    row = LOSSES[options.loss_type]
    loss: Loss = import_class(row.target)(**{option: getattr(options, option) for option in row.options})
    return loss


def plain_mean(errors: Tensor, model_pred: Tensor, target: Tensor, masks: Tensor | None) -> Tensor:
    """(B,) mean of each sample's errors, where its mask counts."""
    return sample_means(errors, masks)


@dataclass(frozen=True)
class Example:
    """What a loss is computed on, on the device of the denoiser.

    Args:
        latents: (B, C, h, w) data.
        noise: (B, C, h, w).
        sigmas: (B,) noise levels.
        noisy_latents: (B, C, h, w) what the denoiser sees.
        target: (B, C, h, w) what the denoiser should predict.
        conditioning: of the family.
        mean: (errors, prediction, target, masks) -> (B,) loss of each sample.
    """

    latents: Tensor
    noise: Tensor
    sigmas: Tensor
    noisy_latents: Tensor
    target: Tensor
    conditioning: Conditioning
    mean: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = plain_mean


# Perturbation, a rollout and prior preservation change what the loss is computed on.
Change = Callable[[Example], Example]
