"""Options of validation that only some families take: each that a family says it takes reaches its pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.validation.prompts import GenerationSettings, ImageRequest, SkippedLayers
from simpletuner.validation.references import ReferenceImage
from simpletuner.validation.sampling import make_images
from simpletuner.validation.schedulers import SCHEDULERS, use_scheduler
from tests.tiny_folders import TINY_FOLDERS

SIDE = 64
OPTIONS = {
    "guidance_rescale": {"guidance_rescale": 0.7},
    "true_cfg_scale": {"true_guidance": 4.0},
    "skip_guidance_layers": {"skipped": SkippedLayers((0,), start=0.0, stop=0.8)},
    "img_guidance_scale": {"image_guidance": 4.0},
}


def load(name: str, folder: Path) -> ModelFamily:
    spec = get_spec(name)
    source = ModelSource(str(TINY_FOLDERS[name](folder)))
    return get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)


REFERENCE = ReferenceImage("red", "red", Image.new("RGB", (SIDE, SIDE), "red"))


def draw(
    family: ModelFamily, scheduler: str | None = None, references: tuple[ReferenceImage, ...] = (), **settings: Any
) -> np.ndarray:
    """With references the placeholder of the prompt too, for families that have some."""
    pipeline = family.pipeline(family.load_denoiser(), family.load_vae())
    if scheduler is not None:
        use_scheduler(pipeline, scheduler)
    prompt = "<img><|image_1|></img> a cat" if references and family.spec.name == "omnigen" else "a cat"
    settings = GenerationSettings(4, 5.0, "a dog", **settings)
    request = ImageRequest("a", prompt, SIDE, SIDE, 1, settings, references=references)
    return np.asarray(make_images(pipeline, [request])[0].image, dtype=int)


@pytest.mark.parametrize("name", family_names())
def test_every_pipeline_option_of_a_family_changes_its_images(name: str, tmp_path: Path) -> None:
    spec = get_spec(name)
    assert set(spec.pipeline_options) <= set(OPTIONS)
    family = load(name, tmp_path / "model")
    for option in spec.pipeline_options:
        references = (REFERENCE,) if option == "img_guidance_scale" else ()
        plain, changed = (draw(family, references=references, **options) for options in ({}, OPTIONS[option]))
        assert not np.array_equal(changed, plain), option


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", [name for name in family_names() if get_spec(name).prediction_type == "epsilon"])
def test_every_sampler_draws_with_an_epsilon_family(name: str, scheduler: str, tmp_path: Path) -> None:
    image = draw(load(name, tmp_path / "model"), scheduler)
    assert image.shape == (SIDE, SIDE, 3)
    assert image.std() > 0
