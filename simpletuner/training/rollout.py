"""Scheduled sampling: some batches are trained on latents that the model itself has denoised from a noisier level.

In training the noisy latents lie exactly on the path between data and noise; in sampling, the model sees what its own
steps have made of them. A rollout closes that gap: from a noisier level it takes a few steps as long as a sampling
step, without gradients, down to the level that was chosen for training, and the target leads from there to the data.

The depth is chosen for a whole micro-batch of all processes, so that each calls the denoiser equally often.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from simpletuner.batch import Conditioning
from simpletuner.diffusion.flow_matching import append_dims
from simpletuner.diffusion.solvers import Level, Solver, SolverName
from simpletuner.families.spec import FamilySpec
from simpletuner.models.family import ModelFamily
from simpletuner.randomness import keyed_uniform
from simpletuner.training.losses.base import Example
from simpletuner.training.losses.reflexflow import ReflexFlow

if TYPE_CHECKING:
    from simpletuner.config.options import TrainConfig

# The drift of latents is divided by their noise to find the target; below this much it would be blown up.
LEAST_NOISE = 0.02


@dataclass(frozen=True)
class Rollouts:
    """When batches are rolled out, and how.

    Args:
        max_depth: steps of the longest rollout; 0 is off.
        step_length: sigma of one step.
        probability: share of the micro-batches, where there is no ramp.
        start_step: optimizer steps before the first rollout.
        ramp_steps: optimizer steps over which the share goes from `ramp_from` to `ramp_to`; 0 is no ramp.
        ramp_shape: of the way between.
        strategy: `uniform` takes each depth equally often, `biased_early` short ones more often, `biased_late` long.
        solver: takes the steps.
        order: of the solver.
        reflex: weights of the loss; None is the usual one.
    """

    max_depth: int = 0
    step_length: float = 1 / 30
    probability: float = 0.0
    start_step: int = 0
    ramp_steps: int = 0
    ramp_from: float = 0.0
    ramp_to: float = 0.5
    ramp_shape: Literal["linear", "cosine"] = "linear"
    strategy: Literal["uniform", "biased_early", "biased_late"] = "uniform"
    solver: SolverName = "unipc"
    order: int = 2
    reflex: ReflexFlow | None = None

    def probability_at(self, step: int) -> float:
        """Share of the micro-batches that are rolled out in the optimizer step after `step` steps."""
        if step < self.start_step:
            return 0.0
        if not self.ramp_steps:
            return self.probability
        done = min((step - self.start_step) / self.ramp_steps, 1.0)
        if self.ramp_shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.ramp_from + (self.ramp_to - self.ramp_from) * done

    def depth(self, seed: int, step: int, micro_step: int) -> int:
        """Steps that a micro-batch is rolled out; 0 for most. The same in all processes."""
        key = (seed, "rollout", step, micro_step)
        if not self.max_depth or keyed_uniform(*key) >= self.probability_at(step):
            return 0
        depths, weights = self._depths()
        left = keyed_uniform(*key, "depth") * sum(weights)
        for depth, weight in zip(depths, weights, strict=True):
            left -= weight
            if left < 0:
                return depth
        return self.max_depth

    def expected_depth(self, num_steps: int) -> float:
        """Passes of the denoiser that rollouts add to a micro-batch, on average over a run of `num_steps`."""
        if not self.max_depth or not num_steps:
            return 0.0
        depths, weights = self._depths()
        mean = sum(depth * weight for depth, weight in zip(depths, weights, strict=True)) / sum(weights)
        return mean * sum(map(self.probability_at, range(num_steps))) / num_steps

    def _depths(self) -> tuple[range, list[int]]:
        """Every depth of a rollout, and how often it is sampled in proportion."""
        depths = range(1, self.max_depth + 1)
        weights = {
            "uniform": [1] * self.max_depth,
            "biased_early": list(reversed(depths)),
            "biased_late": list(depths),
        }
        return depths, weights[self.strategy]


def build_rollouts(config: TrainConfig, spec: FamilySpec) -> Rollouts:
    """The rollouts of a configuration; a step is as long as one of its validation images."""
    is_reflexive = config.objective.scheduled_sampling_reflexflow
    if is_reflexive is None:
        is_reflexive = spec.prediction_type == "flow"
    reflex = ReflexFlow(
        config.objective.scheduled_sampling_reflexflow_alpha,
        config.objective.scheduled_sampling_reflexflow_beta1,
        config.objective.scheduled_sampling_reflexflow_beta2,
    )
    return Rollouts(
        max_depth=config.objective.scheduled_sampling_max_step_offset,
        step_length=1 / config.validation.validation_num_inference_steps,
        probability=config.objective.scheduled_sampling_probability,
        start_step=config.objective.scheduled_sampling_start_step,
        ramp_steps=config.objective.scheduled_sampling_ramp_steps,
        ramp_from=config.objective.scheduled_sampling_prob_start,
        ramp_to=config.objective.scheduled_sampling_prob_end,
        ramp_shape=config.objective.scheduled_sampling_ramp_shape,
        strategy=config.objective.scheduled_sampling_strategy,
        solver=config.objective.scheduled_sampling_sampler,
        order=config.objective.scheduled_sampling_order,
        reflex=reflex if is_reflexive else None,
    )


def train_from_rollout(
    example: Example, family: ModelFamily, denoiser: nn.Module, depth: int, rollouts: Rollouts
) -> Example:
    """The example with latents that the model itself has made; its target leads from there to the data."""
    latents, sigmas = example.latents, example.sigmas
    rolled = roll_out(family, denoiser, example.conditioning, latents, example.noise, sigmas, depth, rollouts)
    noise = implied_noise(family, rolled, latents, sigmas)
    target = family.make_target(latents, noise, sigmas)
    drifted = replace(example, noise=noise, noisy_latents=rolled, target=target)
    if rollouts.reflex is None:
        return drifted
    return replace(drifted, mean=partial(rollouts.reflex.losses, drift=rolled - example.noisy_latents))


@torch.no_grad()
def roll_out(
    family: ModelFamily,
    denoiser: nn.Module,
    conditioning: Conditioning,
    latents: Tensor,
    noise: Tensor,
    sigmas: Tensor,
    depth: int,
    rollouts: Rollouts,
) -> Tensor:
    """Latents at `sigmas` as the model makes them in `depth` steps from a noisier level.

    Args:
        latents: (B, C, h, w) data.
        noise: like `latents`; the noisier level mixes both.
        sigmas: (B,) where the rollout ends. It begins `depth` steps higher, at pure noise at most.
    """
    start = (sigmas + depth * rollouts.step_length).clamp_max(1.0)
    levels = [start + (sigmas - start) * (number / depth) for number in range(depth)] + [sigmas]
    solver = Solver(rollouts.solver, rollouts.order)
    current = family.make_noisy(latents, noise, start).float()
    for here, there in pairwise(levels):
        prediction = family.predict(denoiser, current, here, conditioning).float()
        current = solver.step(
            current,
            family.estimate_data(current, prediction, here),
            Level(*family.signal_and_noise(here)),
            Level(*family.signal_and_noise(there)),
        )
    return current


def implied_noise(family: ModelFamily, noisy_latents: Tensor, latents: Tensor, sigmas: Tensor) -> Tensor:
    """(B, C, h, w) the noise that makes `noisy_latents` of `latents`: what the target is then made of.

    For straight paths the target is `(noisy_latents - latents) / sigma`: the velocity that ends on the data.
    """
    signal, amount = family.signal_and_noise(sigmas)
    signal, amount = (append_dims(each, latents.ndim) for each in (signal, amount.clamp_min(LEAST_NOISE)))
    return (noisy_latents - signal * latents) / amount
