"""What adapter files say of themselves: the weights that they were made for, and the numbers that they hold."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner.adapters import reading
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.metadata import adapter_metadata, is_of_first_version, run_metadata
from simpletuner.adapters.weights import DOWN, UP, AdapterWeights
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_every_adapter_file_says_which_version_of_its_layout_it_has(tmp_path: Path) -> None:
    family = family_in(tiny_sdxl_folder(tmp_path / "model"), "sdxl")
    assert written(family, tmp_path / "a.safetensors")["simpletuner_file_version"] == "2"


LOCK: dict[str, Any] = {
    "simpletuner": "1.2.3",
    "config": {
        "model_family": "sdxl",
        "learning_rate": 1e-4,
        "lr_warmup_steps": 0,
        "seed": 42,
        "train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "caption_dropout_probability": 0.25,
        "mixed_precision": None,
    },
    "base": {"files": {"unet": "ab"}},
    "data": {"cats": {"fingerprint": "f1", "pictures": 5}, "dogs": {"fingerprint": "f2", "pictures": 7}},
}


def test_a_file_says_by_which_settings_and_images_it_was_made() -> None:
    found = run_metadata(LOCK, 34)
    own = json.loads(found.pop("simpletuner"))
    assert found == {
        "ss_learning_rate": "0.0001",
        "ss_lr_warmup_steps": "0",
        "ss_seed": "42",
        "ss_batch_size_per_device": "3",
        "ss_gradient_accumulation_steps": "2",
        "ss_caption_dropout_rate": "0.25",
        "ss_num_train_images": "12",
        "ss_steps": "34",
        "global_step": "34",
    }
    assert (own["version"], own["model_family"], own["step"]) == ("1.2.3", "sdxl", 34)
    assert own["datasets"] == {"cats": "f1", "dogs": "f2"}
    assert own["base_model_sha256"] == hashlib.sha256(b'{"unet": "ab"}').hexdigest()


def test_where_a_run_was_made_leaves_its_digest_as_it_is_and_how_does_not() -> None:
    def digest(**options: Any) -> str:
        changed = {**LOCK, "config": {**LOCK["config"], **options}}
        return json.loads(run_metadata(changed, 1)["simpletuner"])["config_sha256"]

    plain = digest()
    assert {digest(pretrained_model_name_or_path="elsewhere"), digest(output_dir="x"), digest(report_to="wandb")} == {
        plain
    }
    machine = {"main_process_ip": "10.0.0.1", "main_process_port": 29500, "machine_rank": 1}
    assert {digest(**{key: value}) for key, value in machine.items()} == {plain}
    places = ("pretrained_vae_model_name_or_path", "text_encoder_paths", "resume_from_checkpoint", "webhook_config")
    receivers = ("tracker_run_name", "tracker_project_name", "hub_model_id", "push_to_hub")
    assert {key: digest(**{key: "another"}) for key in (*places, *receivers)} == dict.fromkeys(
        places + receivers, plain
    )
    assert digest(learning_rate=2e-4) != plain


@pytest.mark.parametrize(
    ("metadata", "is_first"),
    [
        ({"simpletuner": "{}"}, True),
        ({"simpletuner": "{}", "simpletuner_file_version": "2"}, False),
        (
            {"modelspec.title": "TITLE lora", "modelspec.implementation": "https://github.com/huggingface/diffusers"},
            True,
        ),
        (
            {"modelspec.title": "TITLE lora", "modelspec.implementation": "https://github.com/kohya-ss/sd-scripts"},
            False,
        ),
        ({"modelspec.title": "cat", "modelspec.implementation": "https://github.com/huggingface/diffusers"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_files_of_the_first_version_are_known_by_what_this_program_wrote(
    metadata: dict[str, str], is_first: bool
) -> None:
    spec = get_spec("sd3")
    given = {key: value.replace("TITLE", spec.title) for key, value in metadata.items()}
    assert is_of_first_version(given, spec) is is_first


def test_the_header_of_a_lycoris_file_names_its_algorithm_and_settings() -> None:
    spec = get_spec("sdxl")
    lycoris = {"algo": "lokr", "linear_dim": 8, "linear_alpha": 4, "factor": 16, "apply_preset": {"target_name": []}}
    modules = {"a": {"lokr_w1": torch.ones(1, 1)}}
    found = adapter_metadata(AdapterWeights(modules, lycoris=lycoris), spec)
    assert found["ss_network_module"] == "lycoris.kohya"
    assert json.loads(found["ss_network_args"]) == {"algo": "lokr", "linear_dim": 8, "linear_alpha": 4, "factor": 16}
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("8", "4")
    assert found["modelspec.architecture"] == f"{spec.keys.architecture}/lycoris"
    assert found["modelspec.title"] == f"{spec.title} lokr"
    plain = adapter_metadata(AdapterWeights({"a": {UP: torch.ones(1, 1), DOWN: torch.ones(1, 1)}}), spec)
    assert plain["ss_network_module"] == spec.keys.kohya_network
    assert plain["ss_base_model_version"] == spec.keys.base_model_version
    assert "ss_network_args" not in plain


def test_a_file_of_the_first_version_is_read_with_the_halves_as_diffusers_has_them(monkeypatch) -> None:
    swapped: list[bool] = []

    def note(spec: Any, denoiser: Any, swaps_last_block: bool) -> Any:
        swapped.append(swaps_last_block)
        raise LookupError

    monkeypatch.setattr(reading, "module_names", note)
    denoiser: Any = None
    for metadata in ({"simpletuner": "{}"}, {"simpletuner": "{}", "simpletuner_file_version": "2"}, {}):
        with pytest.raises(LookupError):
            reading.adapter_from_tensors({}, metadata, get_spec("sd3"), denoiser, "a file")
    assert swapped == [False, True, True]
