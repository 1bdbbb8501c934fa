"""One micro-batch from latents to loss: the part that reads like the paper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simpletuner.batch import Batch
from simpletuner.diffusion.loss import sample_means, sample_weights
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


def sample_noise(batch: Batch, seed: int, step: int) -> Tensor:
    """(B, C, h, w) standard normal noise, keyed by (seed, optimizer step, index in the global batch)."""
    rows = [
        torch.randn(latents.shape, generator=keyed_generator(seed, "noise", step, slot))
        for latents, slot in zip(batch.latents, batch.slots, strict=True)
    ]
    return torch.stack(rows)


def sample_quantiles(batch: Batch, seed: int, step: int) -> Tensor:
    """(B,) uniform numbers that become sigmas, keyed like the noise."""
    return torch.tensor([keyed_uniform(seed, "timestep", step, slot) for slot in batch.slots], dtype=torch.float64)


def compute_losses(
    family: ModelFamily,
    denoiser: nn.Module,
    batch: Batch,
    noise: Tensor,
    quantiles: Tensor,
    without_adapter: Callable[[], AbstractContextManager[None]] | None = None,
    objective: Objective = PLAIN,
    perturbed_noise: Tensor | None = None,
    rollouts: Rollouts = NO_ROLLOUTS,
    depth: int = 0,
) -> Losses:
    """Noise the latents, predict, compare.

    Args:
        noise: (B, C, h, w).
        quantiles: (B,) of the distribution of sigmas.
        without_adapter: context in which the denoiser is the untouched base; needed for regularisation batches, whose
            target is the base's own prediction (prior preservation).
        perturbed_noise: mixed into the latents in place of `noise`, which the target keeps.
        depth: steps that the model itself leads the latents, from a noisier level to that of training; 0 none.
    """
    sigmas = objective.sigmas_at(family, quantiles, batch.latents)
    sigmas, loss_weights = send(torch.stack([sigmas, batch.loss_weights]), family.device)  # one copy for both
    latents, noise = send(batch.latents, family.device), send(noise, family.device)
    conditioning = family.collate(batch)
    mixed_in = noise if perturbed_noise is None else send(perturbed_noise, family.device)
    noisy_latents = family.make_noisy(latents, mixed_in, sigmas)
    drift: Tensor | None = None
    if depth and not batch.is_regularisation:
        rolled = roll_out(family, denoiser, conditioning, latents, noise, sigmas, depth, rollouts)
        noise = implied_noise(family, rolled, latents, sigmas)
        drift = rolled - noisy_latents
        noisy_latents = rolled
    if batch.is_regularisation:
        assert without_adapter is not None
        with without_adapter(), torch.no_grad():
            target = family.predict(denoiser, noisy_latents, sigmas, conditioning)
    else:
        target = family.make_target(latents, noise, sigmas)

    model_pred = family.predict(denoiser, noisy_latents, sigmas, conditioning)
    errors = objective.errors(family, model_pred, target, sigmas)
    masks = None if batch.masks is None else send(batch.masks, family.device)
    if drift is not None and rollouts.reflex is not None:
        per_sample = reflexive_losses(errors, model_pred, target, drift, masks, rollouts.reflex)
    else:
        per_sample = sample_means(errors, masks)
    return Losses(objective.weighted(family, per_sample, sigmas), sample_weights(loss_weights, masks), sigmas)


def reflexive_losses(
    errors: Tensor, model_pred: Tensor, target: Tensor, drift: Tensor, masks: Tensor | None, reflex: ReflexFlow
) -> Tensor:
    """(B,) losses of rolled-out latents: errors that weigh by drift, and the direction of the prediction."""
    error = sample_means(errors * compensation_weights(drift, reflex.alpha), masks)
    if masks is not None:
        model_pred, target = model_pred * masks, target * masks
    return reflex.error * error + reflex.direction * direction_loss(model_pred, target)
