"""The discrete noise schedules of epsilon and v-prediction families, under the project's sigmas.

Such a model knows N noise levels t = 0 ... N-1 (Ho et al., "Denoising Diffusion Probabilistic Models", arXiv
2006.11239): `noisy = sqrt(abar_t) * latents + sqrt(1 - abar_t) * noise`. Here sigma in [0, 1] names a level as
`sigma = (t + 1) / N`, so that sigma 1 is the noisiest level and sigma 0 is the data itself, which no level is. All
shared code then speaks of one quantity, whatever the family predicts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from simpletuner.diffusion.flow_matching import append_dims


@dataclass(frozen=True)
class NoiseSchedule:
    """How much of the data is left at each level.

    Args:
        alphas_cumprod: (N,) float64, abar_t for t = 0 ... N-1, falling.
    """

    alphas_cumprod: Tensor

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The schedule of a `scheduler_config.json`, as diffusers' `DDPMScheduler` computes it, in float64.

        Raises:
            ValueError: a beta schedule that is not known here.
        """
        count = config.get("num_train_timesteps", 1000)
        start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
        kind = config.get("beta_schedule", "linear")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        elif kind == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
        else:
            raise ValueError(f'the beta schedule "{kind}" is not known; linear and scaled_linear are')
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        if config.get("rescale_betas_zero_snr"):
            alphas_cumprod = without_signal_at_the_end(alphas_cumprod)
        return cls(alphas_cumprod)

    @property
    def num_levels(self) -> int:
        return len(self.alphas_cumprod)

    def sigmas_at(self, quantiles: Tensor) -> Tensor:
        """(B,) quantiles in [0, 1) -> (B,) float32 sigmas: every level is equally likely, as in DDPM's algorithm 1."""
        levels = (quantiles.to(torch.float64) * self.num_levels).floor().clamp(0, self.num_levels - 1)
        return ((levels + 1) / self.num_levels).to(torch.float32)

    def timesteps(self, sigmas: Tensor) -> Tensor:
        """(B,) sigmas -> (B,) int64 levels t; sigmas between two levels go to the nearest, 0 to the first."""
        return (sigmas * self.num_levels).round().long().sub(1).clamp_min(0)

    def signal_and_noise(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        """(B,) sigmas -> ((B,), (B,)) float32 sqrt(abar) and sqrt(1 - abar); 1 and 0 at sigma 0."""
        table = self._amounts.to(sigmas.device, non_blocking=True)
        signal, noise = table[:, (sigmas * self.num_levels).round().long()]
        return signal, noise

    @cached_property
    def _amounts(self) -> Tensor:
        """(2, N + 1) float32 amounts of data and of noise: without noise first, then at each level."""
        kept = torch.cat([torch.ones(1, dtype=torch.float64), self.alphas_cumprod])
        return torch.stack([kept.sqrt(), (1 - kept).sqrt()]).float()

    def make_noisy(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """(B, ...) noisy latents."""
        signal, amount = (append_dims(each, latents.ndim) for each in self.signal_and_noise(sigmas))
        return signal * latents + amount * noise

    def v_target(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """(B, ...) `sqrt(abar) * noise - sqrt(1 - abar) * latents`.

        Source: Salimans and Ho, "Progressive Distillation" (arXiv 2202.00512), appendix D.
        """
        signal, amount = (append_dims(each, latents.ndim) for each in self.signal_and_noise(sigmas))
        return signal * noise - amount * latents

    def estimate_data(self, noisy_latents: Tensor, model_pred: Tensor, sigmas: Tensor, is_velocity: bool) -> Tensor:
        """(B, ...) the data that a prediction of the noise, or of v, amounts to.

        Of the noise at a level without data nothing can be said; the least signal is kept apart from 0 there.
        """
        signal, amount = (append_dims(each, noisy_latents.ndim) for each in self.signal_and_noise(sigmas))
        if is_velocity:
            return signal * noisy_latents - amount * model_pred
        return (noisy_latents - amount * model_pred) / signal.clamp_min(1e-4)

    def snr(self, sigmas: Tensor) -> Tensor:
        """(B,) float32 signal-to-noise ratios `abar / (1 - abar)`."""
        signal, amount = self.signal_and_noise(sigmas)
        return (signal / amount).square()


def without_signal_at_the_end(alphas_cumprod: Tensor) -> Tensor:
    """(N,) abar shifted and scaled so that the last level holds no data, the first staying as it is.

    Source: Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891), algorithm 1.
    """
    roots = alphas_cumprod.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * first / (first - last)).square()
