"""Losses as a sum and a weight, so that any grouping of samples into micro-batches or ranks gives the same gradient.

A sample's loss is the mean over its elements (over the masked ones, where there is a mask); the loss of an optimizer
step is the weighted mean over all samples of its accumulation window. Callers divide by the window's weight.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from simpletuner.diffusion.flow_matching import append_dims


def squared_error(model_pred: Tensor, target: Tensor) -> Tensor:
    """Element-wise squared error in float32, whatever the inputs' dtype."""
    return (model_pred.float() - target.float()).square()


def huber_error(model_pred: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """Element-wise `2 c (sqrt(d^2 + c^2) - c)`: d^2 for small differences d, and growing like |d| beyond c.

    Source: Khrapov et al., "Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss"
    (arXiv 2403.16728), equation 5; the factor 2 c makes it the squared error for large c.

    Args:
        c: (B,) positive.
    """
    return 2 * append_dims(c, model_pred.ndim) * _pseudo_huber(model_pred, target, c)


def smooth_l1_error(model_pred: Tensor, target: Tensor, c: Tensor) -> Tensor:
    """Element-wise `2 (sqrt(d^2 + c^2) - c)`: like `huber_error`, but |d| counts the same whatever c."""
    return 2 * _pseudo_huber(model_pred, target, c)


def _pseudo_huber(model_pred: Tensor, target: Tensor, c: Tensor) -> Tensor:
    c = append_dims(c, model_pred.ndim)
    return ((model_pred.float() - target.float()).square() + c.square()).sqrt() - c


def huber_limits(schedule: str, c: float, sigmas: Tensor, noise_to_signal: Tensor) -> Tensor:
    """(B,) the c of each sample: where its loss turns from square to linear.

    Source: arXiv 2403.16728, section 4: `constant`; `exponential`, from 1 on data to c on noise; `snr`,
    `(1 - c) / (1 + noise / signal)^2 + c`.

    Args:
        noise_to_signal: (B,) ratio of the amounts of noise and of data.
    """
    if schedule == "constant":
        return torch.full_like(sigmas, c)
    if schedule == "exponential":
        return c**sigmas
    return (1 - c) / (1 + noise_to_signal).square() + c


def min_snr_weights(snr: Tensor, gamma: float, predicts: Literal["epsilon", "v_prediction", "flow"]) -> Tensor:
    """(B,) what each sample's loss is multiplied by, so that the error of the data counts `min(snr, gamma)` times.

    The squared error of the data is that of the noise over the snr, and that of v over `snr + 1`: `min(snr, gamma) /
    snr` and `min(snr, gamma) / (snr + 1)`. On a straight path the data is `noisy - sigma * velocity`, and `sigma` is
    `1 / (1 + sqrt(snr))`.

    Source: Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv 2303.09556), section 3.4;
    the last is its principle applied to a velocity.

    Args:
        snr: (B,) signal-to-noise ratio; infinite without noise.
    """
    if predicts == "flow":
        return snr.clamp_max(gamma) / (1 + snr.sqrt()).square()
    if predicts == "v_prediction":
        return snr.clamp_max(gamma) / (snr + 1)
    return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))


def sample_means(errors: Tensor, masks: Tensor | None = None) -> Tensor:
    """(B,) mean of each sample's element-wise errors.

    Args:
        errors: (B, C, h, w).
        masks: (B, 1, h, w) in [0, 1]; the mean is over mask area, so a small mask is not a small loss.
            A sample whose mask is all zero gives 0: `sample_weights` gives it no weight either.
    """
    if masks is None:
        return errors.flatten(1).mean(dim=1)
    weights = masks.to(errors.dtype).expand_as(errors).flatten(1)
    return (errors.flatten(1) * weights).sum(dim=1) / weights.sum(dim=1).clamp_min(1e-12)


def sample_weights(loss_weights: Tensor, masks: Tensor | None = None) -> Tensor:
    """(B,) what each sample counts: its own weight, or 0 where its mask leaves nothing."""
    if masks is None:
        return loss_weights
    has_area = torch.stack([(mask > 0).any() for mask in masks])
    return loss_weights * has_area.to(loss_weights)
