"""LoRA files of Hunyuan-DiT in the hands of others: PEFT, and programs with the weights of the original release."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.reading import read_adapter
from simpletuner.adapters.weights import ALPHA, DOWN, UP
from simpletuner.families.registry import get_spec
from tests.tiny_hunyuan_dit import tiny_hunyuan_dit_transformer
from tests.witnesses import answers, assert_same, patched

SPEC = get_spec("hunyuan_dit")


def trained(path: Path, file_format: str, targets: tuple[str, ...] = ("all-linear",)) -> dict[str, Tensor]:
    """Write a LoRA in a format; what each layer answers with it."""
    denoiser = tiny_hunyuan_dit_transformer()
    settings = LoraSettings(rank=2, alpha=3, targets=targets, file_format=file_format)
    adapter = attach_lora(denoiser, settings, SPEC, torch.float32, seed=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.trainable_parameters().values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    adapter.save(path, {})
    return answers(denoiser.eval())


def original_from(state: dict[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """Weights of blocks and last layer under the names of the release: diffusers' conversion script backwards."""
    original = {}
    for n in range(num_blocks):
        block = f"blocks.{n}"
        for kind in ("weight", "bias"):
            names = {
                **{f"attn{k}.out_proj": f"attn{k}.to_out.0" for k in (1, 2)},
                **{f"attn{k}.q_norm": f"attn{k}.norm_q" for k in (1, 2)},
                **{f"attn{k}.k_norm": f"attn{k}.norm_k" for k in (1, 2)},
                **{"attn2.q_proj": "attn2.to_q", "default_modulation.1": "norm1.linear", "norm1": "norm1.norm"},
                **{"norm2": "norm3", "norm3": "norm2", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2"},
                **({name: name for name in ("skip_norm", "skip_linear") if f"{block}.{name}.weight" in state}),
            }
            original |= {f"{block}.{theirs}.{kind}": state[f"{block}.{ours}.{kind}"] for theirs, ours in names.items()}
            parts = [state[f"{block}.attn1.to_{name}.{kind}"] for name in "qkv"]
            original[f"{block}.attn1.Wqkv.{kind}"] = torch.cat(parts)
            original[f"{block}.attn2.kv_proj.{kind}"] = torch.cat(
                [state[f"{block}.attn2.to_{name}.{kind}"] for name in "kv"]
            )
    for kind in ("weight", "bias"):
        shift, scale = state[f"norm_out.linear.{kind}"].chunk(2)
        original[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([scale, shift])
        others = {
            **{"final_layer.linear": "proj_out", "x_embedder.proj": "pos_embed.proj"},
            **{f"mlp_t5.{place}": f"text_embedder.linear_{number}" for place, number in ((0, 1), (2, 2))},
            **{f"t_embedder.mlp.{place}": f"{TIME}.timestep_embedder.linear_{n}" for place, n in ((0, 1), (2, 2))},
            **{f"extra_embedder.{place}": f"{TIME}.extra_embedder.linear_{n}" for place, n in ((0, 1), (2, 2))},
            **{f"pooler.{name}_proj": f"{TIME}.pooler.{name}_proj" for name in "kqvc"},
        }
        original |= {f"{theirs}.{kind}": state[f"{ours}.{kind}"] for theirs, ours in others.items()}
    return original


TIME = "time_extra_emb"


def diffusers_from(original: dict[str, Tensor], state: dict[str, Tensor], num_blocks: int) -> dict[str, Tensor]:
    """As `scripts/convert_hunyuandit_to_diffusers.py` has it: every weight of `state` by its place in the original."""
    marked = {name: torch.arange(tensor.numel()).reshape(tensor.shape) for name, tensor in state.items()}
    offsets, count = {}, 0
    for name, tensor in marked.items():
        offsets[name] = count
        marked[name], count = tensor + count, count + tensor.numel()
    places = torch.cat([original_from(marked, num_blocks)[name].flatten() for name in original])
    values = torch.cat([tensor.flatten() for tensor in original.values()])
    flat = torch.cat([tensor.flatten() for tensor in state.values()])
    flat[places] = values
    return {name: flat[start : start + state[name].numel()].view(state[name].shape) for name, start in offsets.items()}


@pytest.mark.parametrize("file_format", ["kohya", "comfyui"])
def test_added_to_the_original_weights_a_file_changes_each_layer_as_it_was_trained(
    file_format: str, tmp_path: Path
) -> None:
    """Fused queries, keys and values, and swapped halves; programs find a layer by its name there."""
    ours = trained(tmp_path / "a.safetensors", file_format)
    file = load_file(tmp_path / "a.safetensors")
    assert any("attn1.Wqkv" in key or "attn1_Wqkv" in key for key in file)
    denoiser = tiny_hunyuan_dit_transformer()
    state, count = denoiser.state_dict(), len(denoiser.blocks)
    original = original_from(state, count)
    assert_same(diffusers_from(original, state, count), state)
    denoiser.load_state_dict(diffusers_from(patched(original, file), state, count))
    assert_same(answers(denoiser), ours, 1e-5)


def test_peft_reads_the_diffusers_form(tmp_path: Path) -> None:
    ours = trained(tmp_path / "a.safetensors", "diffusers", ("attention", "feed-forward"))
    weights = {key.removeprefix("transformer."): each for key, each in load_file(tmp_path / "a.safetensors").items()}
    layers = sorted({key.partition(".lora_")[0] for key in weights})
    denoiser = tiny_hunyuan_dit_transformer()
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=layers), denoiser)
    assert not set_peft_model_state_dict(denoiser, weights).unexpected_keys
    assert_same(answers(denoiser), ours, 1e-5)


def test_tencents_own_folder_is_read_with_its_scale(tmp_path: Path) -> None:
    """PEFT on the original modules, the pooler's among them, where their program gave it no gradient."""
    denoiser = tiny_hunyuan_dit_transformer()
    generator = torch.Generator().manual_seed(0)
    sizes = {"attn1.Wqkv": (48, 16), "attn1.out_proj": (16, 16), "attn2.q_proj": (16, 16), "attn2.kv_proj": (32, 16)}
    file, deltas = {}, {}
    for name, (rows, columns) in sizes.items():
        halves = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
        for half, tensor in zip("AB", halves, strict=True):
            file[f"base_model.model.blocks.0.{name}.lora_{half}.weight"] = tensor
        deltas[name] = 4.0 * halves[1] @ halves[0]
    file["base_model.model.pooler.q_proj.lora_A.weight"] = torch.randn(2, 16, generator=generator)
    file["base_model.model.pooler.q_proj.lora_B.weight"] = torch.zeros(16, 2)
    save_file(file, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 8}))
    weights = read_adapter(tmp_path, SPEC, denoiser)
    assert weights.notices == ("dropped, because an adapter there changes nothing: time_extra_emb.pooler.q_proj",)
    read = weights.modules
    changes = {path: (m[UP] @ m[DOWN]) * float(m[ALPHA]) / len(m[DOWN]) for path, m in read.items()}
    q, k, v = deltas["attn1.Wqkv"].chunk(3)
    k2, v2 = deltas["attn2.kv_proj"].chunk(2)
    expected = {
        **{"attn1.to_q": q, "attn1.to_k": k, "attn1.to_v": v, "attn1.to_out.0": deltas["attn1.out_proj"]},
        **{"attn2.to_q": deltas["attn2.q_proj"], "attn2.to_k": k2, "attn2.to_v": v2},
    }
    assert changes.keys() == {f"blocks.0.{path}" for path in expected}
    for path, change in expected.items():
        torch.testing.assert_close(changes[f"blocks.0.{path}"], change, rtol=0, atol=1e-6)
    settings = LoraSettings(rank=2, targets=("attention",))
    left = attach_lora(denoiser, settings, SPEC, torch.float32, seed=0).start_from(weights, "file")
    assert [path for path in left if path.startswith("blocks.0.")] == ["blocks.0.attn2.to_out.0"]
