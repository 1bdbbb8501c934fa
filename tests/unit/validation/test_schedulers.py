"""Samplers by name: each is known and keeps the noise schedule of the model."""

from __future__ import annotations

from types import SimpleNamespace

import diffusers
import pytest

from simpletuner.config.options import all_options
from simpletuner.validation.schedulers import SCHEDULERS, use_scheduler


def test_every_name_that_the_option_takes_is_known() -> None:
    assert set(all_options()["validation_noise_scheduler"].choices) == set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_sampler_changes_and_the_noise_schedule_stays(name: str) -> None:
    schedule = {"beta_start": 0.001, "beta_end": 0.02, "beta_schedule": "linear"}
    own = diffusers.EulerDiscreteScheduler(**schedule, prediction_type="v_prediction", timestep_spacing="leading")
    pipeline = SimpleNamespace(scheduler=own)
    use_scheduler(pipeline, name)
    assert type(pipeline.scheduler) is getattr(diffusers, SCHEDULERS[name][0])
    for key in ("beta_start", "beta_end", "beta_schedule", "prediction_type", "timestep_spacing"):
        assert pipeline.scheduler.config[key] == own.config[key]
    pipeline.scheduler.set_timesteps(5)
    assert len(pipeline.scheduler.timesteps) >= 5
