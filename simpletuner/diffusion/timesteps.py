"""Distributions of sigmas, written as quantile functions.

A distribution given by its quantile function serves two masters: training feeds it keyed uniform draws, the eval loss
feeds it fixed quantiles, and both see the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

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


def shifted_sigmas(sigmas: Tensor, shift: Tensor | float) -> Tensor:
    """Sigmas moved towards noise, `s sigma / (1 + (s - 1) sigma)`; a shift of 1 leaves them.

    Source: Esser et al. (arXiv 2403.03206), equation 23. FLUX.1's `exp(mu) / (exp(mu) + 1 / sigma - 1)` is the same
    with s = exp(mu).

    Args:
        shift: one for all, or (B,).
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def scheduler_shift(config: Mapping[str, Any], num_patches: int) -> float:
    """The shift of a flow-matching `scheduler_config.json` for a picture of `num_patches`; 1 is none.

    Where it is dynamic, `mu` rises linearly with the patches and the shift is `exp(mu)` (black-forest-labs/flux,
    `flux/sampling.py`).
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", 1.0))
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(low + (high - low) * (num_patches - least) / (most - least))


def uniform_sigmas(quantiles: Tensor) -> Tensor:
    """Sigmas spread evenly over (0, 1)."""
    return quantiles.to(torch.float32)


def fixed_quantiles(count: int) -> Tensor:
    """(count,) midpoints of equal parts of (0, 1): the timesteps of the eval loss."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count
