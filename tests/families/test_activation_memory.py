"""What the blocks of every family keep, and that letting go of the rest changes no bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from simpletuner.activation_memory import recompute
from simpletuner.activation_memory.modules import set_activation_memory
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.batch import Batch
from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from tests.tiny_folders import TINY_FOLDERS

# The tiny ones are not or hardly wider than their input; Sana's are convolutions, which are not made again.
NARROW_MLPS = ("hunyuan_dit", "krea2", "sana")
# Its blocks have no gates of activations, and norms without weights: next to nothing of what is kept is cheap to make.
PLAIN_BLOCKS = ("pixart_sigma",)


def step(family: Any, denoiser: Any, batch: Batch) -> tuple[dict[str, Tensor], int]:
    """The prediction and all gradients, and the bytes that were kept for them."""
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        predicted = family.predict(denoiser, batch.latents, torch.full((2,), 0.3), family.collate(batch))
    trained = {name: weight for name, weight in denoiser.named_parameters() if weight.requires_grad}
    gradients = torch.autograd.grad(predicted.square().sum(), [*trained.values()], allow_unused=True)
    results = {"prediction": predicted, **dict(zip(trained, gradients, strict=True))}
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return results, sum(tensor.untyped_storage().nbytes() for tensor in found.values())


@pytest.mark.parametrize("name", family_names())
def test_blocks_that_keep_little_give_the_bits_of_those_that_keep_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = get_spec(name)
    source = ModelSource(str(TINY_FOLDERS[name](tmp_path)))
    family: Any = get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)
    latents = torch.randn(2, spec.latent_channels, 8, 12, generator=torch.Generator().manual_seed(0))
    embeds = family.encode_prompts(["a cat", "a cat"])
    batch = Batch(latents, embeds, [0, 1], ["", ""], torch.ones(2), "test")
    found = {}
    for level, large in (("low", 1 << 40), ("high", 0), ("low", 0), ("lowest", 0)):
        monkeypatch.setattr(recompute, "LARGE", large)
        denoiser = family.load_denoiser()
        set_activation_memory(denoiser, level)
        attach_lora(denoiser, LoraSettings(rank=2, init="gaussian"), spec, torch.float32, seed=0)
        for parameter in denoiser.parameters():  # `up` begins with zeros, which would hide what is behind it
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
        found[level, large] = step(family, denoiser.train(), batch)
    (expected, plain), (high, num_high), (low, num_low), (lowest, num_lowest) = found.values()
    assert num_low < num_high <= plain
    assert name in PLAIN_BLOCKS or num_low < 0.8 * plain
    assert num_lowest <= num_low if name in NARROW_MLPS else num_lowest < 0.9 * num_low
    for key, wanted in expected.items():
        if wanted is None:
            assert low[key] is None, key
            continue
        # Large norms, gates and frozen convolutions have gradients of their own, on all levels.
        torch.testing.assert_close(low[key], wanted, rtol=1e-4, atol=1e-5, msg=key)
        assert key != "prediction" or torch.equal(low[key], wanted)
        assert torch.equal(high[key], low[key]), key
        assert torch.equal(lowest[key], low[key]), key
