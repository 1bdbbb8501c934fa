"""The assistant LoRA of every family: beside the base it does what it would do merged into it, and leaves no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from simpletuner.adapters.assistant import attach_assistant, without_assistant
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.batch import Batch
from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.training.adapter_roundtrip import probe_output
from tests.assistants import write_assistant
from tests.tiny_folders import TINY_FOLDERS
from tests.witnesses import patched

STRENGTH = 0.5


@pytest.fixture(scope="module", params=family_names())
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFamily:
    spec = get_spec(request.param)
    folder = TINY_FOLDERS[request.param](tmp_path_factory.mktemp(request.param))
    return get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def file(family: ModelFamily, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_assistant(tmp_path_factory.mktemp("assistant") / "assistant.safetensors", family)


def merged(family: ModelFamily, file: Path, strength: float) -> nn.Module:
    """The base with `strength` times what the file says in its weights."""
    denoiser = family.load_denoiser()
    tensors = load_file(file)
    tensors |= {key: strength * tensor for key, tensor in tensors.items() if ".lora_B." in key}
    bare = {key.removeprefix(f"{family.spec.component('denoiser').name}."): t for key, t in tensors.items()}
    denoiser.load_state_dict(patched(denoiser.state_dict(), bare))
    return denoiser


def gradients(family: ModelFamily, denoiser: Any) -> dict[str, torch.Tensor]:
    """Of a LoRA that trains on top, with gradient checkpointing, by the square of the prediction."""
    denoiser.enable_gradient_checkpointing()
    adapter = attach_lora(denoiser.train(), LoraSettings(rank=2, dropout=0.0), family.spec, torch.float32, seed=1)
    side = 4 * family.spec.patch_size
    latents = torch.randn(1, family.spec.latent_channels, side, side, generator=torch.Generator().manual_seed(2))
    batch = Batch(latents, family.encode_prompts(["a cat"]), [0], [""], torch.ones(1), "")
    family.predict(denoiser, latents, torch.tensor([0.5]), family.collate(batch)).square().mean().backward()
    return {name: p.grad for name, p in adapter.trainable_parameters().items() if p.grad is not None}


def test_beside_the_base_it_computes_what_it_would_merged_and_nothing_where_it_is_off(family, file):
    denoiser = family.load_denoiser()
    names, expected = list(denoiser.state_dict()), probe_output(family, denoiser)
    assistant = attach_assistant(denoiser, file, STRENGTH, family.spec)
    assert assistant.num_layers == len(load_file(file)) // 2
    on = probe_output(family, denoiser)
    assert (on - expected).abs().max() > 1e-3
    torch.testing.assert_close(on, probe_output(family, merged(family, file, STRENGTH)), rtol=0, atol=2e-5)
    with without_assistant(denoiser):
        assert torch.equal(probe_output(family, denoiser), expected)
    assert torch.equal(probe_output(family, denoiser), on)
    assert list(denoiser.state_dict()) == names
    assert not any("assistant" in name for name, _ in denoiser.named_parameters())


def test_what_trains_beside_it_gets_the_gradients_of_the_merged_base(family, file):
    denoiser = family.load_denoiser()
    attach_assistant(denoiser, file, STRENGTH, family.spec)
    found, expected = gradients(family, denoiser), gradients(family, merged(family, file, STRENGTH))
    assert found.keys() == expected.keys()
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 0
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6, msg=name)
