"""`simpletuner generate`: file names, the effect of the adapter, refused paths."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image

from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.config.options.validation import ValidationOptions
from simpletuner.errors import ConfigError, DataError
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.validation.generate import GenerationRequest, generate_images, output_paths, requests_of
from simpletuner.validation.sampling import noise_device

LOKR = {"algo": "lokr", "linear_dim": 10000, "factor": 4, "apply_preset": {"target_module": ["Attention"]}}
OPTIONS = ValidationOptions(
    validation_negative_prompt="<cfg>",
    validation_resolution="40x32",
    validation_num_inference_steps=2,
    validation_guidance=2.0,
)
GENERATION = GenerationRequest(("a star", "a circle"), OPTIONS, seed=5, count=2)


@pytest.fixture
def family(omnigen_folder: Path) -> OmniGen:
    return OmniGen(OMNIGEN, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_each_prompt_and_seed_becomes_an_image_and_no_file_is_overwritten(family: OmniGen, tmp_path: Path):
    said: list[str] = []
    first = generate_images(family, GENERATION, None, tmp_path, said.append)
    second = generate_images(family, GENERATION, None, tmp_path, said.append)
    assert [path.name for path in first + second] == [f"{number:04d}.png" for number in range(8)]
    assert pixels(first[0]).shape == (32, 32, 3)
    assert "40x32 becomes 32x32" in said[0]
    assert np.array_equal(pixels(first[1]), pixels(second[1]))
    assert not np.array_equal(pixels(first[0]), pixels(first[1]))


def test_the_adapter_changes_the_image(family: OmniGen, tmp_path: Path):
    denoiser = family.load_denoiser()
    adapter = attach_lycoris(denoiser, LOKR, OMNIGEN, torch.float32, 0)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter.add_(1.0)
    adapter.save(tmp_path / "adapter.safetensors", {})
    plain = generate_images(family, GENERATION, None, tmp_path / "plain", list().append)
    file = tmp_path / "adapter.safetensors"
    adapted = generate_images(family, GENERATION, file, tmp_path / "adapted", list().append)
    assert not np.array_equal(pixels(plain[0]), pixels(adapted[0]))
    silent = generate_images(family, GENERATION, file, tmp_path / "silent", list().append, strength=0.0)
    assert np.array_equal(pixels(plain[0]), pixels(silent[0]))


def test_a_missing_adapter_is_named(family: OmniGen, tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere\.safetensors"):
        generate_images(family, GENERATION, tmp_path / "nowhere.safetensors", tmp_path, list().append)


def test_a_png_name_is_kept_for_one_image_and_becomes_a_folder_for_several(tmp_path: Path):
    assert output_paths(tmp_path / "cat.png", 1) == [tmp_path / "cat.png"]
    assert output_paths(tmp_path / "cat.png", 2) == [tmp_path / "cat" / "0000.png", tmp_path / "cat" / "0001.png"]


def test_new_images_come_behind_the_highest_number_in_the_folder(tmp_path: Path):
    for name in ("0001.png", "0007.png", "cat.png"):
        (tmp_path / name).touch()
    assert [path.name for path in output_paths(tmp_path, 2)] == ["0008.png", "0009.png"]
    assert output_paths(tmp_path / "model-v1.5", 1) == [tmp_path / "model-v1.5" / "0000.png"]


def test_an_image_has_the_seed_that_is_written_and_the_strength_that_was_learned():
    assert (GenerationRequest(("a",), OPTIONS).seed, GenerationRequest(("a",), OPTIONS).count) == (42, 1)
    assert signature(generate_images).parameters["strength"].default == 1.0


def test_prompts_of_a_family_that_keeps_them_are_encoded_before_the_denoiser_is_loaded(
    omnigen_folder: Path, tmp_path: Path, monkeypatch
):
    """With the references as the family shows them to its encoder, and its own word for no prompt."""
    spec = replace(OMNIGEN, caches_prompt_embeds=True)
    family = OmniGen(spec, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)
    Image.new("RGB", (4, 4), (9, 8, 7)).save(tmp_path / "cat.png")
    given: list[Any] = []

    def ahead(*arguments: Any) -> None:
        given.append(arguments)
        raise InterruptedError

    monkeypatch.setattr(family, "prompt_image", lambda image: image.getpixel((0, 0)), raising=False)
    monkeypatch.setattr("simpletuner.validation.generate.PromptsAhead", ahead)
    with pytest.raises(InterruptedError):
        generate_images(family, replace(GENERATION, references=(tmp_path / "cat.png",)), None, tmp_path)
    assert given == [(family, ["a star", "a circle", "<cfg>"], [(9, 8, 7)])]


def test_more_references_than_a_family_takes_are_refused(omnigen_folder: Path, tmp_path: Path):
    spec = replace(OMNIGEN, max_references=1)
    family = OmniGen(spec, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)
    Image.new("RGB", (4, 4)).save(tmp_path / "cat.png")
    one = (tmp_path / "cat.png",)
    with pytest.raises(ConfigError) as refusal:
        requests_of(replace(GENERATION, references=one * 2), family, print)
    [problem] = refusal.value.problems
    assert problem.message == f"2 reference images are too many for {OMNIGEN.title}"
    assert (problem.key, problem.allowed) == ("--reference", "at most 1")
    requests = requests_of(replace(GENERATION, references=one), family, list().append)
    assert [each.name for request in requests for each in request.references] == [str(one[0])] * 4
    assert [(request.shortname, request.height, request.width) for request in requests] == [
        *(("image-0", 32, 32), ("image-0", 32, 32), ("image-1", 32, 32), ("image-1", 32, 32))
    ]


def test_the_images_of_each_prompt_have_the_seeds_that_follow_its_first(family: OmniGen):
    requests = requests_of(GENERATION, family, list().append)
    assert [(request.prompt, request.seed, request.index) for request in requests] == [
        *(("a star", 5, 0), ("a star", 6, 1)),
        *(("a circle", 5, 0), ("a circle", 6, 1)),
    ]


def test_a_folder_that_cannot_be_made_is_named(family: OmniGen, tmp_path: Path):
    (tmp_path / "taken").write_text("no folder")
    with pytest.raises(DataError, match=r"taken.*cannot be written"):
        generate_images(family, GENERATION, None, tmp_path / "taken" / "images", list().append)


class Noted:
    """A pipeline that notes what it is called with."""

    def __init__(self) -> None:
        self.scheduler = DDIMScheduler()
        self.calls: list[dict[str, Any]] = []

    def __call__(self, **arguments: Any) -> SimpleNamespace:
        self.calls.append(arguments)
        return SimpleNamespace(images=[Image.new("RGB", (8, 8)) for _ in arguments["prompt"]])


def test_every_option_of_guidance_and_sampling_reaches_the_pipeline(family: OmniGen, tmp_path: Path, monkeypatch):
    options = OPTIONS.model_copy(
        update={
            "validation_guidance_rescale": 0.7,
            "validation_guidance_real": 3.0,
            "validation_guidance_skip_layers": (1, 2),
            "validation_guidance_skip_scale": 1.5,
            "validation_noise_scheduler": "unipc",
        }
    )
    pipeline = Noted()
    monkeypatch.setattr(family, "pipeline", lambda denoiser, vae: pipeline)
    generate_images(family, GenerationRequest(("a star",), options), None, tmp_path, list().append)
    [call] = pipeline.calls
    assert type(pipeline.scheduler).__name__ == "UniPCMultistepScheduler"
    assert (call["height"], call["width"], call["num_inference_steps"], call["guidance_scale"]) == (32, 32, 2, 2.0)
    assert (call["guidance_rescale"], call["true_cfg_scale"]) == (0.7, 3.0)
    assert (call["skip_guidance_layers"], call["skip_layer_guidance_scale"]) == ([1, 2], 1.5)


def test_noise_is_sampled_where_the_options_say(family: OmniGen):
    family.device = torch.device("meta")
    assert noise_device(OPTIONS, family) == "cpu"
    assert noise_device(OPTIONS.model_copy(update={"validation_seed_source": "gpu"}), family) == "meta"


def test_a_family_without_references_says_so(omnigen_folder: Path):
    spec = replace(OMNIGEN, max_references=0)
    family = OmniGen(spec, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)
    with pytest.raises(ConfigError) as refusal:
        requests_of(replace(GENERATION, references=("cat.png",)), family, print)
    assert refusal.value.problems[0].message == "OmniGen takes no reference images"
