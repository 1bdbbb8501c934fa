"""One micro-batch from latents to loss: the part that reads like the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simpletuner.batch import Batch
from simpletuner.data.interleave import permutation
from simpletuner.diffusion.loss import sample_weights
from simpletuner.models.family import ModelFamily, send
from simpletuner.randomness import keyed_generator, keyed_uniform
from simpletuner.training.losses.base import Change, Example
from simpletuner.training.objective import PLAIN, Objective


@dataclass(frozen=True)
class Losses:
    """What one micro-batch contributes.

    Args:
        per_sample: (B,) loss of each sample.
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


def sample_quantiles(batch: Batch, seed: int, step: int, num_strata: int = 1) -> Tensor:
    """(B,) uniform numbers that become sigmas, keyed like the noise.

    Args:
        num_strata: equal parts of [0, 1), of which each slot of the global batch gets one, in an order that is keyed by
            the step; as many as it has samples.
    """
    strata = permutation(num_strata, seed, "strata", step) if num_strata > 1 else [0]
    quantiles = [
        (strata[slot % num_strata] + keyed_uniform(seed, "timestep", step, slot)) / num_strata for slot in batch.slots
    ]
    return torch.tensor(quantiles, dtype=torch.float64)


def compute_losses(
    family: ModelFamily,
    denoiser: nn.Module,
    batch: Batch,
    noise: Tensor,
    quantiles: Tensor,
    objective: Objective = PLAIN,
    changes: Sequence[Change] = (),
) -> Losses:
    """Add noise, predict, compare with the target, weigh, take the mean.

    Args:
        noise: (B, C, h, w).
        quantiles: (B,) of the distribution of sigmas.
        changes: applied in turn once the noise is added: perturbation, a rollout, prior preservation.
    """
    sigmas = objective.sigmas_at(family, quantiles, batch.latents)
    sigmas, loss_weights = send(torch.stack([sigmas, batch.loss_weights]), family.device)  # one copy for both
    latents, noise = send(batch.latents, family.device), send(noise, family.device)
    conditioning = family.collate(batch)
    noisy_latents = family.make_noisy(latents, noise, sigmas)
    target = family.make_target(latents, noise, sigmas)
    example = Example(latents, noise, sigmas, noisy_latents, target, conditioning)
    for change in changes:
        example = change(example)

    model_pred = family.predict(denoiser, example.noisy_latents, sigmas, conditioning)
    errors = objective.loss.errors(family, model_pred, example.target, sigmas)
    masks = None if batch.masks is None else send(batch.masks, family.device)
    per_sample = example.mean(errors, model_pred, example.target, masks)
    return Losses(objective.weighted(family, per_sample, sigmas), sample_weights(loss_weights, masks), sigmas)
