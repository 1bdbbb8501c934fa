"""Families with discrete noise levels (`diffusion/ddpm.py`): they predict the noise, or v where the scheduler says so.

The denoiser is given the level t = 0 ... N-1; the project's sigma is (t + 1) / N, and its output is the target as is.
"""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from simpletuner.diffusion.ddpm import NoiseSchedule
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import PredictionType
from simpletuner.models.family import ModelFamily


class DiscreteFamily(ModelFamily):
    """Noise, targets and scheduler of a family whose `scheduler_config.json` holds a beta schedule."""

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise levels of the model's scheduler.

        Raises:
            ConfigError: it is one of EDM (arXiv 2206.00364), whose configuration holds no betas.
        """
        if (name := str(self.scheduler_config.get("_class_name"))).startswith("EDM"):
            message = f"{self.source.model} has a {name}: noise levels of EDM are not built"
            raise ConfigError(Problem(message, key="pretrained_model_name_or_path", fix="name another model"))
        return NoiseSchedule.from_config(self.scheduler_config)

    @property
    def prediction_type(self) -> PredictionType:
        return self.scheduler_config.get("prediction_type", self.spec.prediction_type)

    def sigmas_at(self, quantiles: Tensor, latents: Tensor) -> Tensor:
        return self.schedule.sigmas_at(quantiles)

    def make_noisy(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        return self.schedule.make_noisy(latents, noise, sigmas)

    def make_target(self, latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        if self.prediction_type == "v_prediction":
            return self.schedule.v_target(latents, noise, sigmas)
        return noise

    def signal_and_noise(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
        return self.schedule.signal_and_noise(sigmas)

    def estimate_data(self, noisy_latents: Tensor, model_pred: Tensor, sigmas: Tensor) -> Tensor:
        return self.schedule.estimate_data(noisy_latents, model_pred, sigmas, self.prediction_type == "v_prediction")
