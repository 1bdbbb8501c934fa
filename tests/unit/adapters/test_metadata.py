"""What adapter files say of themselves: the weights that they were made for, and the numbers that they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.metadata import run_metadata
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from tests.tiny_flux import tiny_flux_folder
from tests.tiny_sd3 import tiny_sd3_folder
from tests.tiny_sdxl import tiny_sdxl_folder


def family_in(folder: Path, name: str) -> ModelFamily:
    spec = get_spec(name)
    return get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)


def written(family: ModelFamily, path: Path, **settings: Any) -> dict[str, str]:
    """The header of a LoRA's file."""
    adapter = attach_lora(family.load_denoiser(), LoraSettings(**settings), family.spec_of_weights, torch.float32, 0)
    adapter.save(path, {})
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@pytest.mark.parametrize(("flavour", "architecture"), [("dev", "flux-1-dev/lora"), ("schnell", "flux-1-schnell/lora")])
def test_schnell_is_distinguished_from_dev(flavour: str, architecture: str, tmp_path: Path) -> None:
    family = family_in(tiny_flux_folder(tmp_path / "model", flavour), "flux")
    assert written(family, tmp_path / "a.safetensors")["modelspec.architecture"] == architecture


def test_v_prediction_is_what_the_weights_say(tmp_path: Path) -> None:
    family = family_in(tiny_sdxl_folder(tmp_path / "model", prediction_type="v_prediction"), "sdxl")
    assert written(family, tmp_path / "a.safetensors")["modelspec.prediction_type"] == "v"


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"dual_attention_layers": [0], "qk_norm": "rms_norm"}, "3.5-medium"),
        ({"dual_attention_layers": [], "qk_norm": "rms_norm"}, "3.5-large"),
        ({"qk_norm": None}, "3-medium"),
    ],
    ids=str,
)
def test_sd3_says_its_size(config: dict[str, Any], size: str, tmp_path: Path) -> None:
    family = family_in(tiny_sd3_folder(tmp_path), "sd3")
    family.denoiser_config = config
    assert family.spec_of_weights.keys.architecture == f"stable-diffusion-{size}"


@pytest.mark.parametrize(("form", "alpha"), [("diffusers", "4"), ("kohya", "3"), ("lycoris", "3")])
def test_alpha_and_rank_are_those_of_the_tensors(form: str, alpha: str, tmp_path: Path) -> None:
    """diffusers' form has the scale in its weights, so that its alpha is its rank."""
    family = family_in(tiny_sdxl_folder(tmp_path / "model"), "sdxl")
    header = written(family, tmp_path / "a.safetensors", rank=4, alpha=3, file_format=form)
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", alpha)
    alphas = {float(tensor) for key, tensor in load_file(tmp_path / "a.safetensors").items() if key.endswith(".alpha")}
    assert alphas == (set() if form == "diffusers" else {3.0})


def test_joined_matrices_make_the_rank_differ_by_layer(tmp_path: Path) -> None:
    family = family_in(tiny_sd3_folder(tmp_path / "model"), "sd3")
    header = written(family, tmp_path / "a.safetensors", rank=4, alpha=3, file_format="kohya")
    ranks = {len(tensor) for key, tensor in load_file(tmp_path / "a.safetensors").items() if "lora_down" in key}
    assert ranks == {4, 12}
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("Dynamic", "Dynamic")


@pytest.mark.parametrize(
    ("config", "resolution"),
    [
        ({"resolution": 64.0, "resolution_type": "pixel_area"}, "(64, 64)"),
        ({"resolution": 1.0, "resolution_type": "area"}, "(1000, 1000)"),
        ({"resolution": 1024.0, "resolution_type": "pixel"}, "(1024, 1024)"),
    ],
    ids=str,
)
def test_the_resolution_is_width_and_height_in_pixels(config: dict[str, Any], resolution: str) -> None:
    lock = {"config": {"model_family": "sdxl", **config}, "base": {"files": {}}, "data": {}, "simpletuner": "1"}
    assert run_metadata(lock, 1)["ss_resolution"] == resolution


def test_every_adapter_file_says_which_version_of_its_layout_it_has(tmp_path: Path) -> None:
    family = family_in(tiny_sdxl_folder(tmp_path / "model"), "sdxl")
    assert written(family, tmp_path / "a.safetensors")["simpletuner_file_version"] == "2"
