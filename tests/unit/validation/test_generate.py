from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.errors import DataError
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.validation.generate import GenerationRequest, generate_images, output_paths

LOKR = {"algo": "lokr", "linear_dim": 10000, "factor": 4, "apply_preset": {"target_module": ["Attention"]}}
GENERATION = GenerationRequest(("a star", "a circle"), "<cfg>", 32, 40, 2, 2.0, seed=5, count=2)


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


def test_a_folder_that_cannot_be_made_is_named(family: OmniGen, tmp_path: Path):
    (tmp_path / "taken").write_text("no folder")
    with pytest.raises(DataError, match=r"taken.*cannot be written"):
        generate_images(family, GENERATION, None, tmp_path / "taken" / "images", list().append)
