"""Options of validation that only some families take: each that a family says it takes reaches its pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.validation.prompts import GenerationSettings, ImageRequest, SkippedLayers
from simpletuner.validation.sampling import make_images
from simpletuner.validation.schedulers import SCHEDULERS, use_scheduler
from tests.tiny_folders import TINY_FOLDERS

SIDE = 64
OPTIONS = {
    "guidance_rescale": {"guidance_rescale": 0.7},
    "true_cfg_scale": {"true_guidance": 4.0},
    "skip_guidance_layers": {"skipped": SkippedLayers((0,), start=0.0, stop=0.8)},
}


def load(name: str, folder: Path) -> ModelFamily:
    spec = get_spec(name)
    source = ModelSource(str(TINY_FOLDERS[name](folder)))
    return get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)


def draw(family: ModelFamily, scheduler: str | None = None, **settings: Any) -> np.ndarray:
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    if scheduler is not None:
        use_scheduler(pipeline, scheduler)
    request = ImageRequest("a", "a cat", SIDE, SIDE, 1, GenerationSettings(4, 5.0, "a dog", **settings))
    return np.asarray(make_images(pipeline, [request])[0].image, dtype=int)


@pytest.mark.parametrize("name", family_names())
def test_every_pipeline_option_of_a_family_changes_its_images(name: str, tmp_path: Path) -> None:
    spec = get_spec(name)
    assert set(spec.pipeline_options) <= set(OPTIONS)
    family = load(name, tmp_path / "model")
    plain = draw(family)
    for option in spec.pipeline_options:
        assert not np.array_equal(draw(family, **OPTIONS[option]), plain), option


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_sampler_draws_with_an_epsilon_family(scheduler: str, tmp_path: Path) -> None:
    (name,) = [name for name in family_names() if get_spec(name).prediction_type == "epsilon"]
    image = draw(load(name, tmp_path / "model"), scheduler)
    assert image.shape == (SIDE, SIDE, 3)
    assert image.std() > 0
