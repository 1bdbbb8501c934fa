"""Rectified flow in the project's one convention: sigma 0 is data, sigma 1 is noise.

Source: Lipman et al., "Flow Matching for Generative Modeling" (arXiv 2210.02747), and Liu et al., "Flow Straight and
Fast" (arXiv 2209.03003): a straight path between data and noise, whose velocity is the regression target.
"""

from __future__ import annotations

import torch
from torch import Tensor


def append_dims(values: Tensor, ndim: int) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with `ndim` axes, to broadcast against a batch."""
    return values.reshape(values.shape + (1,) * (ndim - values.ndim))


def make_noisy_latents(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """The point at `sigmas` on the straight path: `(1 - sigma) * latents + sigma * noise`.

    Args:
        latents: (B, ...) data.
        noise: (B, ...) standard normal.
        sigmas: (B,) in [0, 1].
    """
    return torch.lerp(latents, noise, append_dims(sigmas.to(latents.dtype), latents.ndim))


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """The derivative of that path by sigma: `noise - latents`."""
    return noise - latents


def data_from_velocity(noisy_latents: Tensor, velocity: Tensor, sigmas: Tensor) -> Tensor:
    """Where a step from sigma to 0 along `velocity` lands: the denoiser's estimate of the data."""
    return noisy_latents - append_dims(sigmas.to(noisy_latents.dtype), noisy_latents.ndim) * velocity
