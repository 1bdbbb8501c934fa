"""Checkpoints of OmniGen2's own program: a pickle of the whole state, with or without a LoRA in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from simpletuner.adapters.files import apply_adapter_file
from simpletuner.commands.omnigen2.convert import convert_checkpoint
from simpletuner.errors import ConfigError, DataError
from simpletuner.families.registry import get_spec
from simpletuner.models.omnigen2.transformer import OmniGen2Transformer2DModel
from tests.tiny_omnigen2 import tiny_omnigen2_transformer

ARCHITECTURE = """
model:
  arch_opt: {patch_size: 2, in_channels: 16, hidden_size: 64, num_layers: 2, num_refiner_layers: 1,
    num_attention_heads: 4, num_kv_heads: 2, multiple_of: 16, axes_dim_rope: [4, 6, 6], axes_lens: [1024, 300, 300],
    text_feat_dim: 24, timestep_scale: !!float 1000}
"""
INPUTS = (torch.ones(1, 16, 4, 4), torch.tensor([0.5]), torch.ones(1, 3, 24))


def options(folder: Path, train: str = "{lora_ft: false}") -> Path:
    (folder / "run.yml").write_text(f"name: run\ntrain: {train}{ARCHITECTURE}")
    return folder / "run.yml"


def answer(denoiser: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return denoiser(*INPUTS)


@pytest.mark.parametrize(
    ("name", "save"),
    [("pytorch_model_fsdp.bin", torch.save), ("model.safetensors", save_file), ("MODEL.PT", torch.save)],
)
def test_a_whole_state_becomes_a_folder_that_diffusers_loads(tmp_path: Path, name: str, save: Any) -> None:
    denoiser = tiny_omnigen2_transformer(seed=5)
    save(denoiser.state_dict(), tmp_path / name)
    saved = convert_checkpoint(options(tmp_path), tmp_path / name, tmp_path / "transformer", print)
    again = OmniGen2Transformer2DModel.from_pretrained(saved).eval()
    torch.testing.assert_close(again.state_dict(), denoiser.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(answer(again), answer(denoiser))


def test_of_a_state_with_a_lora_the_adapter_alone_is_kept_and_means_the_same(tmp_path: Path) -> None:
    """The original injects PEFT's layers and saves the frozen weights with them."""
    from peft import LoraConfig, inject_adapter_in_model

    adapted = tiny_omnigen2_transformer(seed=5)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = LoraConfig(r=4, lora_alpha=4, init_lora_weights="gaussian", target_modules=targets)
    adapted = inject_adapter_in_model(config, adapted).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    torch.save(adapted.state_dict(), tmp_path / "pytorch_model_fsdp.bin")
    lora = options(tmp_path, "{lora_ft: true, lora_rank: 4}")
    saved = convert_checkpoint(lora, tmp_path / "pytorch_model_fsdp.bin", tmp_path / "lora", print)
    tensors = load_file(saved / "pytorch_lora_weights.safetensors")
    assert len(tensors) == 2 * 4 * 5
    assert all(key.startswith("transformer.") and ".lora_" in key and ".default" not in key for key in tensors)
    plain = tiny_omnigen2_transformer(seed=5)
    before = answer(plain)
    apply_adapter_file(plain, saved / "pytorch_lora_weights.safetensors", get_spec("omnigen2"))
    torch.testing.assert_close(answer(plain), answer(adapted), rtol=0, atol=1e-5)
    assert (answer(plain) - before).abs().max() > 1e-3
    diffusers_own = tiny_omnigen2_transformer(seed=5)
    diffusers_own.load_lora_adapter(tensors, prefix="transformer")
    torch.testing.assert_close(answer(diffusers_own), answer(adapted), rtol=0, atol=1e-5)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    state = tiny_omnigen2_transformer().state_dict()
    weights, folder = tmp_path / "pytorch_model_fsdp.bin", tmp_path / "out"
    torch.save(state, weights)
    with pytest.raises(ConfigError, match="holds no LoRA"):
        convert_checkpoint(options(tmp_path, "{lora_ft: true, lora_rank: 4}"), weights, folder, print)
    plain = options(tmp_path)
    with pytest.raises(ConfigError, match="there is no weights file"):
        convert_checkpoint(plain, tmp_path / "none.bin", folder, print)
    state.pop("x_embedder.bias")
    torch.save(state, weights)
    with pytest.raises(DataError, match=r"does not match model.arch_opt.*x_embedder.bias"):
        convert_checkpoint(plain, weights, folder, print)
    torch.save({"x": Path("/")}, weights)
    with pytest.raises(DataError, match="contains more than tensors, and none of it was run"):
        convert_checkpoint(plain, weights, folder, print)
    assert not folder.exists()
