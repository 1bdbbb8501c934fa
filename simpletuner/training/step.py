"""One micro-batch from latents to loss: the part that reads like the paper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simpletuner.batch import Batch
from simpletuner.diffusion.loss import Latents, sample_means, sample_weights, squared_error
from simpletuner.models.family import ModelFamily
from simpletuner.randomness import keyed_generator, keyed_uniform


@dataclass(frozen=True)
class Losses:
    """What one micro-batch contributes.

    Args:
        per_sample: (B,) mean squared error of each sample.
        weights: (B,) what each sample counts.
        sigmas: (B,) noise levels that were used.
    """

    per_sample: Tensor
    weights: Tensor
    sigmas: Tensor

    @property
    def weighted_sum(self) -> Tensor:
        """() sum over samples; divided by the window's total weight it is the loss of the optimizer step."""
        return (self.per_sample * self.weights).sum()


def draw_noise(batch: Batch, seed: int, step: int) -> Latents:
    """Standard normal noise, keyed by (seed, optimizer step, index in the global batch)."""
    rows = [
        torch.randn(latents.shape, generator=keyed_generator(seed, "noise", step, slot))
        for latents, slot in zip(batch.latents, batch.slots, strict=True)
    ]
    return torch.stack(rows) if isinstance(batch.latents, Tensor) else rows


def draw_quantiles(batch: Batch, seed: int, step: int) -> Tensor:
    """(B,) uniform numbers that become sigmas, keyed like the noise."""
    return torch.tensor([keyed_uniform(seed, "timestep", step, slot) for slot in batch.slots], dtype=torch.float64)


def compute_losses(
    family: ModelFamily,
    denoiser: nn.Module,
    batch: Batch,
    noise: Latents,
    quantiles: Tensor,
    without_adapter: Callable[[], AbstractContextManager[None]] | None = None,
) -> Losses:
    """Noise the latents, predict, compare.

    Args:
        noise: like `batch.latents`.
        quantiles: (B,) of the family's distribution of sigmas.
        without_adapter: context in which the denoiser is the untouched base; needed for regularisation batches, whose
            target is the base's own prediction (prior preservation).
    """
    sigmas = family.sigmas_at(quantiles, batch.latents).to(family.device)
    latents, noise = to_device(batch.latents, family.device), to_device(noise, family.device)
    conditioning = family.collate(batch)

    noisy_latents = each_latent(family.make_noisy, latents, noise, sigmas)
    if batch.is_regularisation:
        assert without_adapter is not None
        with without_adapter(), torch.no_grad():
            target = family.predict(denoiser, noisy_latents, sigmas, conditioning)
    else:
        target = each_latent(family.make_target, latents, noise, sigmas)

    model_pred = family.predict(denoiser, noisy_latents, sigmas, conditioning)
    errors = each_latent(squared_error, model_pred, target)
    masks = None if batch.masks is None else batch.masks.to(family.device)
    weights = sample_weights(batch.loss_weights.to(family.device), masks)
    return Losses(sample_means(errors, masks), weights, sigmas)


def to_device(latents: Latents, device: torch.device) -> Latents:
    """A tensor or list of tensors on `device`, without waiting for the copy."""
    if isinstance(latents, Tensor):
        return latents.to(device, non_blocking=True)
    return [row.to(device, non_blocking=True) for row in latents]


def each_latent(function: Callable[..., Tensor], *values: Latents) -> Latents:
    """Apply a batched function to tensors (B, ...), or row by row where latents are lists of mixed sizes."""
    if all(isinstance(value, Tensor) for value in values):
        return function(*values)
    return [function(*(row[None] for row in rows))[0] for rows in zip(*values, strict=True)]
