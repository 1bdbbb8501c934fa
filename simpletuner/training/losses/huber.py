"""The pseudo-Huber error: square for small differences, linear beyond a turning point that follows the noise.

Source: Khrapov et al., "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss"
(arXiv 2403.16728).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from simpletuner.diffusion.flow_matching import append_dims
from simpletuner.models.family import ModelFamily
from simpletuner.training.losses.base import Loss


@dataclass(frozen=True)
class Huber(Loss):
    """`2 c (sqrt(d^2 + c^2) - c)`: d^2 for small differences d, and growing like |d| beyond c (equation 5 times 2 c).

    Args:
        huber_schedule: how c follows the noise.
        huber_c: c, on pure noise where it follows the noise.
    """

    huber_schedule: Literal["snr", "exponential", "constant"] = "snr"
    huber_c: float = 0.1

    def errors(self, family: ModelFamily, model_pred: Tensor, target: Tensor, sigmas: Tensor) -> Tensor:
        limits = self.limits(family, sigmas)
        return 2 * append_dims(limits, model_pred.ndim) * pseudo_huber(model_pred, target, limits)

    def limits(self, family: ModelFamily, sigmas: Tensor) -> Tensor:
        """(B,) the c of each sample."""
        signal, noise = family.signal_and_noise(sigmas)
        return turning_points(self.huber_schedule, self.huber_c, sigmas, noise / signal.clamp_min(1e-8))


def pseudo_huber(model_pred: Tensor, target: Tensor, limits: Tensor) -> Tensor:
    """(B, C, h, w) `sqrt(d^2 + c^2) - c` in float32.

    Args:
        limits: (B,) positive, the c of each sample.
    """
    limits = append_dims(limits, model_pred.ndim)
    return ((model_pred.float() - target.float()).square() + limits.square()).sqrt() - limits


def turning_points(schedule: str, c: float, sigmas: Tensor, noise_to_signal: Tensor) -> Tensor:
    """(B,) where the loss of each sample turns from square to linear (section 4).

    `constant`; `exponential`, from 1 on data to c on noise; `snr`, `(1 - c) / (1 + noise / signal)^2 + c`.

    Args:
        noise_to_signal: (B,) ratio of the amounts of noise and of data.
    """
    if schedule == "constant":
        return torch.full_like(sigmas, c)
    if schedule == "exponential":
        return c**sigmas
    return (1 - c) / (1 + noise_to_signal).square() + c
