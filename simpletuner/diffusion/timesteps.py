"""Distributions of sigmas, written as quantile functions.

A distribution given by its quantile function serves two masters: training feeds it keyed uniform draws, the eval loss
feeds it fixed quantiles, and both see the same distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_normal_sigmas(quantiles: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Sigmas whose logit is normal: `sigmoid(mean + std * Phi^-1(q))`.

    Source: Esser et al., "Scaling Rectified Flow Transformers" (arXiv 2403.03206), section 3.1.

    Args:
        quantiles: (B,) in [0, 1); 0 is moved to the smallest float32 step, so that no sigma is infinite's image.
    """
    eps = torch.finfo(torch.float32).eps
    normal = torch.special.ndtri(quantiles.to(torch.float64).clamp(eps, 1 - eps))
    return torch.sigmoid(mean + std * normal).to(torch.float32)


def uniform_sigmas(quantiles: Tensor) -> Tensor:
    """Sigmas spread evenly over (0, 1)."""
    return quantiles.to(torch.float32)


def fixed_quantiles(count: int) -> Tensor:
    """(count,) midpoints of equal parts of (0, 1): the timesteps of the eval loss."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count
