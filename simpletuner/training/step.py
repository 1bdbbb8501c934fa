"""One micro-batch from latents to loss: the part that reads like the paper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from simpletuner.batch import Batch
from simpletuner.diffusion.loss import Latents, sample_means, sample_weights
from simpletuner.diffusion.reflexflow import compensation_weights, direction_loss
from simpletuner.models.family import ModelFamily, send
from simpletuner.randomness import keyed_generator, keyed_uniform
from simpletuner.training.objective import PLAIN, Objective
from simpletuner.training.rollout import ReflexFlow, Rollouts, implied_noise, roll_out

NO_ROLLOUTS = Rollouts()


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
        return self.per_sample.dot(self.weights)


def sample_noise(batch: Batch, seed: int, step: int) -> Latents:
    """Standard normal noise, keyed by (seed, optimizer step, index in the global batch)."""
    rows = [
        torch.randn(latents.shape, generator=keyed_generator(seed, "noise", step, slot))
        for latents, slot in zip(batch.latents, batch.slots, strict=True)
    ]
    return torch.stack(rows) if isinstance(batch.latents, Tensor) else rows


def sample_quantiles(batch: Batch, seed: int, step: int) -> Tensor:
    """(B,) uniform numbers that become sigmas, keyed like the noise."""
    return torch.tensor([keyed_uniform(seed, "timestep", step, slot) for slot in batch.slots], dtype=torch.float64)


def compute_losses(
    family: ModelFamily,
    denoiser: nn.Module,
    batch: Batch,
    noise: Latents,
    quantiles: Tensor,
    without_adapter: Callable[[], AbstractContextManager[None]] | None = None,
    objective: Objective = PLAIN,
    perturbed_noise: Latents | None = None,
    rollouts: Rollouts = NO_ROLLOUTS,
    depth: int = 0,
) -> Losses:
    """Noise the latents, predict, compare.

    Args:
        noise: like `batch.latents`.
        quantiles: (B,) of the distribution of sigmas.
        without_adapter: context in which the denoiser is the untouched base; needed for regularisation batches, whose
            target is the base's own prediction (prior preservation).
        perturbed_noise: mixed into the latents in place of `noise`, which the target keeps.
        depth: steps that the model itself leads the latents, from a noisier level to that of training; 0 none.
    """
    sigmas = objective.sigmas_at(family, quantiles, batch.latents)
    sigmas, loss_weights = send(torch.stack([sigmas, batch.loss_weights]), family.device)  # one copy for both
    latents, noise = to_device(batch.latents, family.device), to_device(noise, family.device)
    conditioning = family.collate(batch)
    mixed_in = noise if perturbed_noise is None else to_device(perturbed_noise, family.device)
    noisy_latents = each_latent(family.make_noisy, latents, mixed_in, sigmas)
    drift: Latents | None = None
    if depth and not batch.is_regularisation:
        rolled = roll_out(family, denoiser, conditioning, latents, noise, sigmas, depth, rollouts)
        noise = each_latent(partial(implied_noise, family), rolled, latents, sigmas)
        drift = each_latent(torch.sub, rolled, noisy_latents)
        noisy_latents = rolled
    if batch.is_regularisation:
        assert without_adapter is not None
        with without_adapter(), torch.no_grad():
            target = family.predict(denoiser, noisy_latents, sigmas, conditioning)
    else:
        target = each_latent(family.make_target, latents, noise, sigmas)

    model_pred = family.predict(denoiser, noisy_latents, sigmas, conditioning)
    errors = each_latent(partial(objective.errors, family), model_pred, target, sigmas)
    masks = None if batch.masks is None else send(batch.masks, family.device)
    if drift is not None and rollouts.reflex is not None:
        per_sample = reflexive_losses(errors, model_pred, target, drift, masks, rollouts.reflex)
    else:
        per_sample = sample_means(errors, masks)
    return Losses(objective.weighted(family, per_sample, sigmas), sample_weights(loss_weights, masks), sigmas)


def reflexive_losses(
    errors: Latents, model_pred: Latents, target: Latents, drift: Latents, masks: Tensor | None, reflex: ReflexFlow
) -> Tensor:
    """(B,) losses of rolled-out latents: errors that weigh by drift, and the direction of the prediction."""
    scale = each_latent(partial(compensation_weights, alpha=reflex.alpha), drift)
    error = sample_means(each_latent(torch.mul, errors, scale), masks)
    if masks is not None:
        model_pred, target = (each_latent(torch.mul, values, masks) for values in (model_pred, target))
    direction = each_latent(direction_loss, model_pred, target)
    return reflex.error * error + reflex.direction * (
        direction if isinstance(direction, Tensor) else torch.stack(direction)
    )


def to_device(latents: Latents, device: torch.device) -> Latents:
    """A tensor or list of tensors on `device`, without waiting for the copy."""
    if isinstance(latents, Tensor):
        return send(latents, device)
    return [send(row, device) for row in latents]


def each_latent(function: Callable[..., Tensor], *values: Latents) -> Latents:
    """Apply a batched function to tensors (B, ...), or row by row where latents are lists of mixed sizes."""
    if all(isinstance(value, Tensor) for value in values):
        return function(*values)
    return [function(*(row[None] for row in rows))[0] for rows in zip(*values, strict=True)]
