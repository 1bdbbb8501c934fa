"""Comparing with tensors that the public pipelines and training scripts gave (`tests/golden`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.batch import Conditioning, PromptEmbeds
from simpletuner.diffusion.loss import sample_means
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily, PromptReferences
from simpletuner.training.losses.l2 import squared_error


def family_of(name: str, folder: Path) -> ModelFamily:
    spec = get_spec(name)
    return get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)


def assert_near(found: Tensor, expected: Tensor, share: float = 1e-5) -> None:
    """Equal to a share of the largest value."""
    torch.testing.assert_close(found, expected, rtol=0, atol=share * float(expected.abs().max()))


class GivenPrompts:
    """Prompts from a table, in place of the family's encoders.

    Args:
        table: prompt -> the tensors of its `PromptEmbeds`.
    """

    def __init__(self, table: Mapping[str, Mapping[str, Tensor]]):
        self.table = table

    def embeds(self, prompts: Sequence[str], references: PromptReferences | None = None) -> list[PromptEmbeds]:
        return [PromptEmbeds(self.table[prompt]) for prompt in prompts]

    def close(self) -> None: ...


def lora_weights(golden: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in golden.items() if name.endswith(("lora_A.weight", "lora_B.weight"))}


def assert_trains_as(
    family: ModelFamily, golden: Mapping[str, Tensor], conditioning: Callable[[], Conditioning]
) -> None:
    """Prediction, loss and LoRA gradients of one training step; the adapter has rank 2 and the scale 1."""
    denoiser, weights = family.load_denoiser().train(), lora_weights(golden)
    paths = sorted({name.rpartition(".lora_")[0] for name in weights})
    adapter = attach_lora(denoiser, LoraSettings(rank=2, alpha=2, targets=tuple(paths)), family.spec, torch.float32, 0)
    parameters = adapter.trainable_parameters()
    assert parameters.keys() == weights.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    latents, noise, sigmas = golden["latents"], golden["noise"], golden["sigmas"]
    prediction = family.predict(denoiser, family.make_noisy(latents, noise, sigmas), sigmas, conditioning())
    assert_near(prediction.detach(), golden["prediction"])
    loss = sample_means(squared_error(prediction, family.make_target(latents, noise, sigmas))).mean()
    assert_near(loss.detach(), golden["loss"])
    loss.backward()
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        assert_near(parameter.grad, golden[f"{name}.grad"], 1e-4)
