"""Distributions of sigmas, written as quantile functions.

A distribution given by its quantile function serves two masters: training feeds it keyed uniform draws, the eval loss
feeds it fixed quantiles, and both see the same distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

ShiftCurve = Literal["exponential", "sqrt"]

# Points of a table of a distribution that has no closed form; its quantiles are exact to about the square of the pitch.
_TABLE = 16384
# To find a quantile, a range is divided into so many cells, so many times: it is then known to 4e-6.
_CELLS, _SEARCHES = 64, 3


def logit_normal_sigmas(quantiles: Tensor, mean: float = 0.0, std: float = 1.0) -> Tensor:
    """Sigmas whose logit is normal: `sigmoid(mean + std * Phi^-1(q))`.

    Source: Esser et al., "Scaling Rectified Flow Transformers" (arXiv 2403.03206), section 3.1.

    Args:
        quantiles: (B,) in [0, 1); 0 is moved to the smallest float64 step, so that no sigma is infinite's image.
    """
    # The smallest step of float64, not of float32: quantiles of other distributions (uniform, beta) reach far out, and
    # those beyond the limit would all have one level.
    eps = torch.finfo(torch.float64).eps
    normal = torch.special.ndtri(quantiles.to(torch.float64).clamp(eps, 1 - eps))
    return torch.sigmoid(mean + std * normal).to(torch.float32)


def shifted_sigmas(sigmas: Tensor, shift: Tensor | float) -> Tensor:
    """Sigmas moved toward noise, `s sigma / (1 + (s - 1) sigma)`; a shift of 1 leaves them.

    Source: Esser et al. (arXiv 2403.03206), equation 23. FLUX.1's `exp(mu) / (exp(mu) + 1 / sigma - 1)` is the same
    with s = exp(mu).

    Args:
        shift: one for all, or (B,).
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def scheduler_shift(config: Mapping[str, Any], num_patches: int) -> float:
    """The shift of a flow-matching `scheduler_config.json` for an image of `num_patches`; 1 is none.

    Where it is dynamic, `mu` rises linearly with the patches and the shift is `exp(mu)` (black-forest-labs/flux,
    `flux/sampling.py`).
    """
    if not config.get("use_dynamic_shifting"):
        return float(config.get("shift", config.get("flow_shift", 1.0)))  # `flow_shift` is DPM-Solver's name for it
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return math.exp(low + (high - low) * (num_patches - least) / (most - least))


def uniform_sigmas(quantiles: Tensor) -> Tensor:
    """Sigmas spread evenly over (0, 1)."""
    return quantiles.to(torch.float32)


def fixed_quantiles(count: int) -> Tensor:
    """(count,) midpoints of equal parts of (0, 1): the timesteps of the eval loss."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def beta_sigmas(quantiles: Tensor, alpha: float, beta: float) -> Tensor:
    """Sigmas with a beta distribution, whose density is `sigma^(alpha - 1) (1 - sigma)^(beta - 1)`.

    Tabulated over `theta` with `sigma = sin(theta)^2`, where the density is bounded for alpha and beta from 0.5 on.

    Args:
        quantiles: (B,) in [0, 1).
    """
    theta = torch.linspace(0, math.pi / 2, _TABLE + 1, dtype=torch.float64)
    middle = (theta[1:] + theta[:-1]) / 2
    mass = middle.sin() ** (2 * alpha - 1) * middle.cos() ** (2 * beta - 1)
    below = torch.cat([torch.zeros(1, dtype=torch.float64), mass.cumsum(0)])
    return interpolate(quantiles.double() * below[-1], below, theta).sin().square().to(torch.float32)


def mode_sigmas(quantiles: Tensor, scale: float) -> Tensor:
    """Sigmas of SD3's mode sampling with heavy tails: a scale above 0 prefers the middle, below 0 the ends.

    Source: Esser et al. (arXiv 2403.03206), equation 20, turned round so that it rises with the quantile; its
    distribution is symmetric.

    Args:
        scale: in [-1, 2 / (pi - 2)], where the function is monotonic.
    """
    quantiles = quantiles.double()
    bent = (math.pi / 2 * quantiles).cos().square() - 1 + quantiles
    return (quantiles + scale * bent).to(torch.float32)


def stretched_sigmas(sigmas: Tensor, terminal: float) -> Tensor:
    """Sigmas of [0, 1] spread over [terminal, 1], as flow schedulers with `shift_terminal` spread theirs.

    diffusers divides by the distance of the last sigma of its grid from 1; here sigmas are continuous, and the last
    one is 0.
    """
    return 1 - (1 - sigmas) * (1 - terminal)


def level_weights(sigmas: Tensor, weighting: Literal["sigma_sqrt", "cosmap"]) -> Tensor:
    """(B,) weights of noise levels: `sigma_sqrt` 1 / sigma^2, `cosmap` 2 / (pi (1 - 2 sigma + 2 sigma^2)).

    Source: Esser et al. (arXiv 2403.03206), section 3.1; the first one under the name that diffusers' scripts gave it.
    Below a thousandth, where their grids end, it grows no further.
    """
    if weighting == "sigma_sqrt":
        return sigmas.clamp_min(1e-3) ** -2.0
    return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas.square()))


def chosen_sigmas(quantiles: Tensor, values: Sequence[float]) -> Tensor:
    """Equally likely ones of `values`, by size: sigmas in [0, 1]."""
    table = torch.tensor(sorted(values), dtype=torch.float32)
    places = (quantiles.double() * len(values)).floor().long().clamp(0, len(values) - 1)
    return table[places.cpu()]


def logit_normal_quantiles(sigmas: Tensor) -> Tensor:
    """(B,) float64: where sigmas stand in the standard logit-normal distribution; the inverse of its quantiles."""
    return torch.special.ndtr(torch.logit(sigmas.double(), eps=1e-12))


def shift_of_size(num_patches: int, curve: ShiftCurve = "exponential") -> float:
    """The shift for an image of so many patches.

    `exponential` is FLUX.1's: e^mu, mu from 0.5 at 256 patches to 1.15 at 4096. `sqrt` is sqrt(patches) / 20, with
    which OmniGen2 samples (`omnigen2/transport/transport.py`, its shift v2).
    """
    if curve == "sqrt":
        return math.sqrt(num_patches) / 20
    return scheduler_shift({"use_dynamic_shifting": True}, num_patches)


def biased_quantiles(
    quantiles: Tensor, sigmas_at: Callable[[Tensor], Tensor], low: float, high: float, multiplier: float
) -> Tensor:
    """Quantiles after which sigmas of [low, high] are drawn `multiplier` times as often, relative to the others.

    Args:
        quantiles: (B,) uniform.
        sigmas_at: quantile function of the distribution that is biased.
    """
    first, last = _quantiles_between(sigmas_at, low, high)
    inside = last - first
    places = quantiles.double() * (1 + (multiplier - 1) * inside)  # within a mass of `multiplier` inside, 1 outside
    end = first + multiplier * inside
    within = first + (places - first) / (multiplier or 1.0)
    return torch.where(places < first, places, torch.where(places < end, within, last + (places - end)))


def _quantiles_between(sigmas_at: Callable[[Tensor], Tensor], low: float, high: float) -> tuple[float, float]:
    """The quantiles from which on sigmas are at least `low`, and above `high`."""
    starts, width = torch.zeros(2, 1, dtype=torch.float64), 1.0
    for _ in range(_SEARCHES):
        width /= _CELLS
        grid = starts + width * torch.arange(1, _CELLS, dtype=torch.float64)
        lows, highs = sigmas_at(grid.flatten()).double().cpu().view(2, -1)
        starts = starts + width * torch.stack([(lows < low).sum(), (highs <= high).sum()])[:, None]
    first, last = (starts + width / 2).flatten().tolist()
    return (0.0 if first < width else first), (1.0 if last > 1 - width else last)


def interpolate(values: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """(B,) the piecewise linear function through (xs, ys) at `values`; `xs` ascend."""
    values = values.cpu()
    right = torch.searchsorted(xs, values, right=True).clamp(1, len(xs) - 1)
    x0, x1, y0, y1 = xs[right - 1], xs[right], ys[right - 1], ys[right]
    share = torch.where(x1 > x0, (values - x0) / (x1 - x0).clamp_min(1e-300), torch.zeros_like(values))
    return y0 + share * (y1 - y0)
