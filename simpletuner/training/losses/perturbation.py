"""Input perturbation: the latents hold more noise than the target knows of.

Source: Ning et al., "Input Perturbation Reduces Exposure Bias in Diffusion Models" (arXiv 2301.11706).
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from simpletuner.models.family import ModelFamily, send
from simpletuner.training.losses.base import Example


def perturb(example: Example, family: ModelFamily, perturbed_noise: Tensor) -> Example:
    """The example with other noise in its latents; the target stays.

    Args:
        perturbed_noise: (B, C, h, w).
    """
    noise = send(perturbed_noise, family.device)
    return replace(example, noisy_latents=family.make_noisy(example.latents, noise, example.sigmas))
