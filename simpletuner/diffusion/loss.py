"""Losses as a sum and a weight, so that any grouping of samples into micro-batches or ranks gives the same gradient.

A sample's loss is the mean over its elements (over the masked ones, where there is a mask); the loss of an optimizer
step is the weighted mean over all samples of its accumulation window. Callers divide by the window's weight.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
