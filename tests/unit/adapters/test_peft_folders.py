"""Folders that PEFT itself writes: their settings give the weights their scale, here as in PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from simpletuner.adapters.files import apply_adapter_file
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.reading import read_adapter
from simpletuner.commands.export import find_source
from simpletuner.errors import DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import run_stock

LAYERS = ["to_q", "to_v", "mlp.down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "alpha": {"lora_alpha": 10},
    "patterns": {
        "lora_alpha": 2,
        "rank_pattern": {"to_v": 3},
        "alpha_pattern": {"to_v": 12, r"layers\.1\.mlp\.down_proj": 1, "^layers.0.self_attn.to_q": 9},
    },
    "rslora": {"lora_alpha": 10, "use_rslora": True, "rank_pattern": {"to_v": 2}},
    "dora": {"lora_alpha": 10, "use_dora": True},
}


def peft_folder(path: Path, **settings: Any) -> torch.Tensor:
    """A folder with a random LoRA; returns what the model answers with it."""
    model = get_peft_model(tiny_omnigen_transformer(), LoraConfig(r=4, target_modules=LAYERS, **settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(path)
        return run_stock(model.base_model.model.eval())


@pytest.mark.parametrize("name", SETTINGS)
def test_a_folder_of_peft_gives_the_output_that_it_gives_in_peft(name: str, tmp_path: Path) -> None:
    expected = peft_folder(tmp_path / "adapter", **SETTINGS[name])
    for place in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        denoiser = tiny_omnigen_transformer()
        assert apply_adapter_file(denoiser, place, OMNIGEN).notices == []
        with torch.no_grad():
            torch.testing.assert_close(run_stock(denoiser), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["alpha", "rslora", "dora"])
def test_training_goes_on_from_a_folder_of_peft(name: str, tmp_path: Path) -> None:
    expected = peft_folder(tmp_path, **SETTINGS[name])
    denoiser = tiny_omnigen_transformer()
    start = read_adapter(tmp_path, OMNIGEN, denoiser)
    targets = tuple(f"layers.*.{layer}" for layer in ("self_attn.to_q", "self_attn.to_v", "mlp.down_proj"))
    settings = LoraSettings(rank=8, targets=targets, use_dora=name == "dora")
    assert attach_lora(denoiser, settings, OMNIGEN, torch.float32, seed=1).start_from(start, str(tmp_path)) == []
    with torch.no_grad():
        torch.testing.assert_close(run_stock(denoiser.eval()), expected, rtol=0, atol=1e-5)


def test_a_folder_of_peft_is_a_source_of_export_by_its_own_name(tmp_path: Path) -> None:
    peft_folder(tmp_path / "cat")
    assert find_source(tmp_path / "cat").file.name == "adapter_model.safetensors"
    assert find_source(tmp_path / "cat").name == "cat"


def test_weights_of_peft_without_their_settings_are_read_with_a_warning(tmp_path: Path) -> None:
    peft_folder(tmp_path, lora_alpha=4)
    (tmp_path / "adapter_config.json").unlink()
    [notice] = apply_adapter_file(tiny_omnigen_transformer(), tmp_path, OMNIGEN).notices
    assert "no adapter_config.json" in notice
    assert "scale 1" in notice


def test_settings_that_cannot_be_read_or_mean_another_base_are_refused_by_name(tmp_path: Path) -> None:
    peft_folder(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    for change, message in (
        ({"init_lora_weights": "pissa_niter_4"}, "a base that pissa_niter_4 has changed"),
        ({"use_qalora": True}, "use_qalora computes another function"),
        ({"peft_type": "LOHA"}, "it is a LOHA adapter of PEFT"),
    ):
        file.write_text(json.dumps(config | change))
        with pytest.raises(DataError, match=message):
            read_adapter(tmp_path, OMNIGEN, tiny_omnigen_transformer())
    file.write_text("{")
    with pytest.raises(DataError, match="is not valid JSON"):
        read_adapter(tmp_path, OMNIGEN, tiny_omnigen_transformer())


def test_a_lokr_of_peft_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny_omnigen_transformer(), LoKrConfig(r=4, alpha=8, target_modules=LAYERS))
    model.save_pretrained(tmp_path)
    with pytest.raises(DataError, match="it is a LOKR adapter"):
        read_adapter(tmp_path, OMNIGEN, tiny_omnigen_transformer())


def test_the_settings_that_diffusers_writes_into_the_header_count_too(tmp_path: Path) -> None:
    """`save_lora_adapter` of diffusers keeps them there."""
    expected = peft_folder(tmp_path / "peft", **SETTINGS["patterns"])
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    entries = {f"transformer.{name}": config[name] for name in ("r", "lora_alpha", "alpha_pattern", "use_rslora")}
    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    renamed = {key.replace("base_model.model.", "transformer."): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "diffusers.safetensors", {"lora_adapter_metadata": json.dumps(entries)})
    denoiser = tiny_omnigen_transformer()
    apply_adapter_file(denoiser, tmp_path / "diffusers.safetensors", OMNIGEN)
    with torch.no_grad():
        torch.testing.assert_close(run_stock(denoiser), expected, rtol=0, atol=1e-5)
