"""Each form of a file, put into the hands of the programs that the table of readers names.

diffusers loads it by its own pipeline; programs that keep the weights of the original release add it to those, which
diffusers' own converter of single files then brings back. In both cases every layer must answer what it answered when
it was trained, or what the table says instead. `tests/witnesses.py` knows none of this project's adapter code.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from simpletuner.adapters.base import Adapter
from simpletuner.adapters.files import apply_adapter_file
from simpletuner.adapters.formats import encode, peft_metadata
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.adapters.reading import read_adapter
from simpletuner.adapters.weights import AdapterWeights
from simpletuner.errors import ConfigError
from simpletuner.families.readers import FORMS, NO_LENGTHS, SILENT, readers_of
from simpletuner.families.registry import get_spec
from simpletuner.families.spec import FamilySpec
from tests.runs import slow_but
from tests.tiny_auraflow import tiny_auraflow_transformer
from tests.tiny_flux2 import tiny_flux2_transformer
from tests.tiny_kolors import tiny_kolors_unet
from tests.tiny_krea2 import tiny_krea2_transformer
from tests.tiny_qwen_image import tiny_qwen_image_transformer
from tests.tiny_qwen_image_21 import tiny_qwen_image_21_transformer
from tests.tiny_sana import tiny_sana_transformer
from tests.tiny_sd3 import tiny_sd3_transformer
from tests.tiny_sd15 import tiny_sd15_unet
from tests.tiny_sdxl import tiny_unet
from tests.tiny_z_image import tiny_z_image_transformer
from tests.witnesses import (
    answers,
    assert_same,
    differences,
    narrow_chroma,
    narrow_flux,
    narrow_lumina2,
    original_weights,
    read_by_diffusers,
    read_by_original_names,
    read_by_own_names,
)

DENOISERS = {
    "sdxl": tiny_unet,
    "flux": narrow_flux,
    "flux2": tiny_flux2_transformer,
    "krea2": tiny_krea2_transformer,
    "qwen_image_21": tiny_qwen_image_21_transformer,
    "chroma": narrow_chroma,
    "sana": tiny_sana_transformer,
    "auraflow": tiny_auraflow_transformer,
    "lumina2": narrow_lumina2,
    "sd3": tiny_sd3_transformer,
    "kolors": tiny_kolors_unet,
    "qwen_image": tiny_qwen_image_transformer,
    "qwen_image_edit": tiny_qwen_image_transformer,
    "z_image": tiny_z_image_transformer,
    "sd15": tiny_sd15_unet,
}
BLOCKS = ("attention", "feed-forward")
LORA = {
    "default layers": LoraSettings(rank=4, alpha=3),  # some rows of joined matrices are not trained
    "all-linear": LoraSettings(rank=2, alpha=3, targets=("all-linear",)),
    "dora": LoraSettings(rank=2, alpha=3, targets=BLOCKS, use_dora=True),
}
LYCORIS = {
    "locon": {"algo": "locon", "linear_dim": 2, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 3, "preset": "full"},
    "lokr": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 3, "factor": 2, "preset": "attn-mlp"},
    "whole lokr": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 2, "preset": "attn-mlp"},
    "loha": {"algo": "loha", "linear_dim": 2, "linear_alpha": 3, "preset": "attn-mlp"},
}
TOLERANCE = 1e-5
# What diffusers says of a file that it does not read.
REFUSALS = r"Invalid (LoRA|adapter) checkpoint|not been correctly renamed|should be empty|Target modules .* not found"


def trained(denoiser: nn.Module, spec: FamilySpec, name: str) -> Adapter:
    adapter: Adapter
    if name in LORA:
        adapter = attach_lora(denoiser, LORA[name], spec, torch.float32, seed=0)
    else:
        adapter = attach_lycoris(denoiser, LYCORIS[name], spec, torch.float32, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    denoiser.eval()
    return adapter


def is_held(spec: FamilySpec, form: str, weights: AdapterWeights) -> bool:
    """Whether a form can hold an adapter: the others must be refused, by name."""
    keys = spec.keys.in_model(weights.modules)
    joined = [path for path in weights.modules if len(keys.original(path).parts) > 1]
    is_lora = weights.kind in ("lora", "dora")
    return is_lora or form == "lycoris" or form in spec.keys.own_names or (form != "diffusers" and not joined)


QUICK = ("default layers", "lokr")


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but((*LORA, *LYCORIS), QUICK))
@pytest.mark.parametrize("family", DENOISERS)
def test_every_form_does_elsewhere_what_the_table_says(family: str, name: str, tmp_path: Path) -> None:
    spec, make = get_spec(family), DENOISERS[family]
    before = answers(make())
    denoiser = make()
    trained(denoiser, spec, name).save(tmp_path / "trained.safetensors", {})
    ours = answers(denoiser)
    weights = read_adapter(tmp_path / "trained.safetensors", spec, make())
    assert {path for path, off in differences(ours, before).items() if off > 1e-3} == set(weights.modules)
    for form in FORMS:
        if not is_held(spec, form, weights):
            with pytest.raises(ConfigError, match=r"hold plain LoRA|only a plain LoRA can be moved there"):
                encode(weights, spec, form, make())
            continue
        path = tmp_path / f"{form}.safetensors"
        metadata = peft_metadata(weights, spec) if form == "diffusers" else {}
        save_file(encode(weights, spec, form, make()), path, metadata)
        require_table_of_diffusers(path, spec, form, weights, before, ours, make())
        if form != "diffusers":
            assert_same(answers(witness_of(spec, form)(path, spec, make())), ours, TOLERANCE)


def witness_of(spec: FamilySpec, form: str) -> Callable[[Path, FamilySpec, nn.Module], nn.Module]:
    has_own_names = form == "lycoris" or form in spec.keys.own_names
    return read_by_own_names if has_own_names else read_by_original_names


def require_table_of_diffusers(
    path: Path,
    spec: FamilySpec,
    form: str,
    weights: AdapterWeights,
    before: dict[str, torch.Tensor],
    ours: dict[str, torch.Tensor],
    stock: nn.Module,
) -> None:
    """diffusers' pipeline reads the file as the table says; where the table is silent, it refuses the file."""
    readers = [reader for reader in readers_of(spec.readers, form, weights.kind) if reader.program == "diffusers"]
    if not readers:
        with pytest.raises(ValueError, match=REFUSALS):
            read_by_diffusers(path, spec, stock)
        return
    [reader] = readers
    if reader.layers_refused(weights.modules):
        with pytest.raises((ValueError, KeyError), match=r"Incompatible keys|should be empty|adaLN_modulation"):
            read_by_diffusers(path, spec, stock)
        return
    theirs = answers(read_by_diffusers(path, spec, stock))
    if reader.instead == SILENT:
        assert_same(theirs, before, TOLERANCE)
        return
    if reader.instead == NO_LENGTHS:
        plain = {key: tensor for key, tensor in load_file(path).items() if "dora_scale" not in key}
        save_file(plain, path.with_name("plain.safetensors"))
        ours = answers(witness_of(spec, form)(path.with_name("plain.safetensors"), spec, DENOISERS[spec.name]()))
    left, misread = reader.layers_left_out(weights.modules), reader.layers_misread(weights.modules)
    assert all(differences(theirs, ours)[layer] > TOLERANCE for layer in misread)
    expected = ours | {layer: before[layer] for layer in left} | {layer: theirs[layer] for layer in misread}
    assert_same(theirs, expected, TOLERANCE)


@pytest.mark.parametrize("family", DENOISERS)
def test_a_file_by_original_names_is_read_as_it_changes_the_original_weights(family: str, tmp_path: Path) -> None:
    """Of every layer that the original release has, as another trainer would write it."""
    spec, make = get_spec(family), DENOISERS[family]
    generator = torch.Generator().manual_seed(0)
    file = {}
    for name, weight in original_weights(make(), spec.keys).items():
        if name.endswith(".weight") and weight.dim() == 2:
            rows, columns = weight.shape
            key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
            file[f"{key}.lora_down.weight"] = torch.randn(2, columns, generator=generator)
            file[f"{key}.lora_up.weight"] = 0.1 * torch.randn(rows, 2, generator=generator)
            file[f"{key}.alpha"] = torch.tensor(3.0)
    save_file(file, tmp_path / "foreign.safetensors")
    expected = answers(read_by_original_names(tmp_path / "foreign.safetensors", spec, make()))
    denoiser = make()
    apply_adapter_file(denoiser, tmp_path / "foreign.safetensors", spec)
    assert_same(answers(denoiser), expected, TOLERANCE)


@pytest.mark.parametrize("marks", [{"simpletuner": "{}"}, {"modelspec.title": "Stable Diffusion 3 lora"}], ids=str)
def test_a_file_of_the_first_version_has_the_last_context_norm_of_sd3_as_diffusers(marks, tmp_path: Path) -> None:
    """That version did not exchange its halves; every other file does."""
    key = "lora_unet_joint_blocks_1_context_block_adaLN_modulation_1"
    file = {f"{key}.lora_down.weight": torch.ones(1, 32), f"{key}.lora_up.weight": torch.arange(64.0)[:, None]}
    marks = {"modelspec.implementation": "https://github.com/huggingface/diffusers", **marks}
    layer = "transformer_blocks.1.norm1_context.linear"
    for metadata, first in ((marks, 0.0), (marks | {"simpletuner_file_version": "2"}, 32.0), ({}, 32.0)):
        save_file(file, tmp_path / "file.safetensors", metadata)
        read = read_adapter(tmp_path / "file.safetensors", get_spec("sd3"), tiny_sd3_transformer())
        assert read.modules[layer]["lora_up.weight"][0].item() == first


def test_a_table_of_readers_names_only_layers_of_its_family() -> None:
    for family, make in DENOISERS.items():
        layers = answers(make())
        for reader in get_spec(family).readers:
            for pattern in (*reader.leaves_out, *reader.refuses, *reader.misreads, *reader.whole_blocks):
                assert type(reader)("x", (), (), (pattern,)).layers_left_out(layers), (family, pattern)
