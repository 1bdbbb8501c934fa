"""What the configuration adds to a family's own objective: noise levels, noise, loss and its weights.

The eval loss never sees any of it: it stays the family's own, so that two settings can be compared by it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from simpletuner.config.options.objective import ObjectiveOptions
from simpletuner.diffusion import timesteps
from simpletuner.models.family import ModelFamily
from simpletuner.randomness import keyed_generator, keyed_uniform
from simpletuner.training.losses.base import Loss, build_loss
from simpletuner.training.losses.l2 import L2
from simpletuner.training.losses.min_snr import min_snr_weights

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simpletuner.config.options import TrainConfig


@dataclass(frozen=True)
class SigmaSchedule:
    """Which noise levels are drawn.

    Args:
        kind: `family` is the family's own distribution.
        mean: of the normal whose sigmoid `logit_normal` is.
        scale: its deviation.
        alpha: of `beta`.
        beta: of `beta`.
        mode_scale: of `mode`.
        values: of `custom`.
        shift: moves what was drawn toward noise; None does so as the family does, 1 not at all.
        shifts_by_size: take the shift of the image's number of patches.
        curve: how that shift grows.
        terminal: the least noise level; what was drawn is spread over the levels from there on.
    """

    kind: Literal["family", "logit_normal", "uniform", "beta", "mode", "custom"] = "family"
    scale: float = 1.0
    alpha: float = 2.0
    beta: float = 2.0
    values: tuple[float, ...] = ()
    shift: float | None = None
    shifts_by_size: bool = False
    mean: float = 0.0
    mode_scale: float = 1.29
    curve: timesteps.ShiftCurve = "exponential"
    terminal: float = 0.0

    def sigmas_at(self, family: ModelFamily, quantiles: Tensor, latents: Tensor) -> Tensor:
        """(B,) quantiles in [0, 1) -> (B,) float32 sigmas."""
        sigmas = self._shifted(family, quantiles, latents)
        return timesteps.stretched_sigmas(sigmas, self.terminal) if self.terminal else sigmas

    def _shifted(self, family: ModelFamily, quantiles: Tensor, latents: Tensor) -> Tensor:
        if self.kind == "family":
            return family.sigmas_at(quantiles, latents)
        if self.kind == "custom":
            return timesteps.chosen_sigmas(quantiles, self.values)
        sigmas = self._generated(quantiles)
        if self.shifts_by_size:
            num_patches = latents.shape[-2] * latents.shape[-1] // family.spec.patch_size**2
            shift = torch.tensor(timesteps.shift_of_size(num_patches, self.curve))
            return timesteps.shifted_sigmas(sigmas, shift.expand(len(sigmas)))
        if self.shift is not None:
            return timesteps.shifted_sigmas(sigmas, self.shift)
        # As the family has it: what it makes of a logit-normal distribution, with this one in its place.
        return family.sigmas_at(timesteps.logit_normal_quantiles(sigmas), latents)

    def _generated(self, quantiles: Tensor) -> Tensor:
        if self.kind == "uniform":
            return timesteps.uniform_sigmas(quantiles)
        if self.kind == "beta":
            return timesteps.beta_sigmas(quantiles, self.alpha, self.beta)
        if self.kind == "mode":
            return timesteps.mode_sigmas(quantiles, self.mode_scale)
        return timesteps.logit_normal_sigmas(quantiles, self.mean, self.scale)


@dataclass(frozen=True)
class TimestepBias:
    """Noise levels in [low, high] are drawn `multiplier` times as often, relative to the others."""

    low: float
    high: float
    multiplier: float


@dataclass(frozen=True)
class Objective:
    """How training differs from predicting the family's target with the mean squared error.

    Args:
        loss: error of each element.
        snr_gamma: bound of min-SNR weights; None weighs all alike.
        noise_offset: deviation of one number for each channel that is added to the noise; 0 adds none.
        noise_offset_probability: share of the images whose noise has it.
        input_perturbation: deviation of the noise that the target does not know of.
        input_perturbation_steps: optimizer steps over which it falls to 0; 0 keeps it.
        schedule: noise levels.
        bias: some of them more often.
        is_stratified: the images of an optimizer step share the noise levels out among them.
        weighting: of noise levels, as SD3's scripts have it.
    """

    loss: Loss = field(default_factory=L2)
    snr_gamma: float | None = None
    noise_offset: float = 0.0
    noise_offset_probability: float = 0.25
    input_perturbation: float = 0.0
    input_perturbation_steps: int = 0
    schedule: SigmaSchedule = SigmaSchedule()
    bias: TimestepBias | None = None
    is_stratified: bool = False
    weighting: Literal["none", "sigma_sqrt", "cosmap"] = "none"

    def sigmas_at(self, family: ModelFamily, quantiles: Tensor, latents: Tensor) -> Tensor:
        """(B,) quantiles in [0, 1) -> (B,) float32 sigmas."""
        if self.bias is not None:

            def one_size(each: Tensor) -> Tensor:
                return self.schedule.sigmas_at(family, each, latents[:1].expand(len(each), *latents.shape[1:]))

            bias = self.bias
            quantiles = timesteps.biased_quantiles(quantiles, one_size, bias.low, bias.high, bias.multiplier)
        return self.schedule.sigmas_at(family, quantiles, latents)

    def offset_noise(self, noise: Tensor, slots: Sequence[int], seed: int, step: int) -> Tensor:
        """The noise with one number more for each channel, keyed as the noise is."""
        if not self.noise_offset:
            return noise
        rows = []
        for row, slot in zip(noise, slots, strict=True):
            if keyed_uniform(seed, "noise offset", step, slot) < self.noise_offset_probability:
                generator = keyed_generator(seed, "noise offset", step, slot)
                row = row + self.noise_offset * torch.randn(row.shape[0], 1, 1, generator=generator)
            rows.append(row)
        return torch.stack(rows)

    def perturbed_noise(self, noise: Tensor, slots: Sequence[int], seed: int, step: int) -> Tensor | None:
        """What is mixed into the latents in place of `noise`, which the target keeps; None where they are the same.

        Source: Ning et al., "Input Perturbation Reduces Exposure Bias in Diffusion Models" (arXiv 2301.11706).
        """
        left = 1 - step / self.input_perturbation_steps if self.input_perturbation_steps else 1.0
        if not self.input_perturbation or left <= 0:
            return None
        rows = [
            row
            + left * self.input_perturbation * torch.randn(row.shape, generator=keyed_generator(seed, "input", step, s))
            for row, s in zip(noise, slots, strict=True)
        ]
        return torch.stack(rows)

    def weighted(self, family: ModelFamily, per_sample: Tensor, sigmas: Tensor) -> Tensor:
        """(B,) losses of samples, multiplied by the weights of their noise levels where there are some."""
        if self.weighting != "none":
            per_sample = per_sample * timesteps.level_weights(sigmas, self.weighting)
        if self.snr_gamma is None:
            return per_sample
        signal, noise = family.signal_and_noise(sigmas)
        return per_sample * min_snr_weights((signal / noise).square(), self.snr_gamma, family.prediction_type)


PLAIN = Objective()


def build_objective(config: TrainConfig) -> Objective:
    """The objective of a configuration."""
    return Objective(
        loss=build_loss(config.objective),
        snr_gamma=config.objective.snr_gamma or None,
        noise_offset=config.objective.noise_offset if config.objective.offset_noise else 0.0,
        noise_offset_probability=config.objective.noise_offset_probability,
        input_perturbation=config.objective.input_perturbation,
        input_perturbation_steps=config.objective.input_perturbation_steps,
        schedule=_schedule(config.objective),
        bias=_bias(config.objective),
        is_stratified=config.objective.timestep_stratified,
        weighting=config.objective.flow_loss_weighting,
    )


def _schedule(options: ObjectiveOptions) -> SigmaSchedule:
    if options.flow_custom_timesteps is not None:
        return SigmaSchedule("custom", values=options.flow_custom_timesteps)
    shift = partial(
        SigmaSchedule,
        shift=options.flow_schedule_shift or None,
        shifts_by_size=options.flow_schedule_auto_shift,
        curve=options.flow_schedule_auto_shift_curve,
        terminal=options.flow_schedule_terminal,
    )
    if options.flow_use_uniform_schedule:
        return shift("uniform")
    if options.flow_use_beta_schedule:
        return shift("beta", alpha=options.flow_beta_schedule_alpha, beta=options.flow_beta_schedule_beta)
    if options.flow_use_mode_schedule:
        return shift("mode", mode_scale=options.flow_mode_scale)
    mean, scale = options.flow_logit_mean, options.flow_sigmoid_scale
    is_family = not options.flow_schedule_shift and not options.flow_schedule_auto_shift and (mean, scale) == (0, 1)
    return shift("family") if is_family else shift("logit_normal", mean=mean, scale=scale)


def _bias(options: ObjectiveOptions) -> TimestepBias | None:
    if options.timestep_bias_strategy == "none":
        return None
    ranges = {
        "earlier": (0.0, options.timestep_bias_portion),
        "later": (1 - options.timestep_bias_portion, 1.0),
        "range": (options.timestep_bias_begin / 1000, options.timestep_bias_end / 1000),
    }
    return TimestepBias(*ranges[options.timestep_bias_strategy], options.timestep_bias_multiplier)
