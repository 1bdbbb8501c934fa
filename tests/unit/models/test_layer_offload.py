"""Layers of text encoders that wait in main memory: one is on the device at a time, and the states are the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import Qwen3ForCausalLM

from simpletuner.batch import PromptImage
from simpletuner.families.registry import get_spec
from simpletuner.models.family import ModelFamily
from simpletuner.models.layer_offload import offload_layers, repeated_layers
from simpletuner.training.planning.encoding import encoding_cost
from tests.golden_cases import family_of
from tests.tiny_folders import TINY_FOLDERS
from tests.tiny_text import tiny_qwen3

PROMPTS = ["a cat", "a green star on a white background"]


def encoders_of(family: ModelFamily) -> list[nn.Module]:
    return [family.encoders.encoder(part.name) for part in family.spec.components if part.role == "text_encoder"]


def num_bytes(module: nn.Module) -> int:
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


class Watched:
    """Counts the layers whose weights are elsewhere than they wait.

    Args:
        family: has its encoders already.
    """

    def __init__(self, family: ModelFamily):
        layers = [layer for encoder in encoders_of(family) for layer in repeated_layers(encoder)]
        self.places = {layer: [each.data_ptr() for each in layer.parameters()] for layer in layers}
        self.counts: list[int] = []  # in each call of a layer
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_: self.counts.append(self.num_away))

    @property
    def num_away(self) -> int:
        return sum(places != [each.data_ptr() for each in layer.parameters()] for layer, places in self.places.items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "z_image", "flux2", "qwen_image", "qwen_image_edit", "omnigen2", "sd3"])
@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
def test_the_embeddings_are_the_same_with_one_layer_on_the_device(name: str, precision: str, tmp_path: Path) -> None:
    """T5 and CLIP, language models alone, with some of their layers asked for, and with a tower that sees images."""
    folder = TINY_FOLDERS[name](tmp_path / "model")
    whole, offloaded = family_of(name, folder), family_of(name, folder)
    formats = replace(whole.number_formats, encoders=(precision,) * 3)
    whole.number_formats, offloaded.number_formats = formats, replace(formats, offloads_encoders=True)
    images = None
    if get_spec(name).prompts_see_references:
        images = [[PromptImage.of(Image.new("RGB", (64, 48), "red"))]] * len(PROMPTS)
    expected = whole.encode_prompts(PROMPTS, images)
    watched = Watched(offloaded)
    found = offloaded.encode_prompts(PROMPTS, images)
    for one, other in zip(found, expected, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        assert all(torch.equal(one.tensors[key], tensor) for key, tensor in other.tensors.items())
    assert set(watched.counts) == {1}
    assert watched.num_away == 0


def test_lists_within_layers_are_no_layers_of_their_own() -> None:
    """T5's blocks hold lists of their parts."""
    inner = nn.Module()
    inner.layer = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    body = nn.Module()
    body.block = nn.ModuleList([inner, nn.Linear(2, 2)])
    body.norm = nn.LayerNorm(2)
    model = nn.Module()
    model.body, model.head = body, nn.Linear(2, 2)
    assert repeated_layers(model) == list(body.block)


class Moved(TorchFunctionMode):
    """The places of tensors that are asked for on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to:
            self.places.add(args[0].data_ptr())
        return func(*args, **(kwargs or {}))


def test_only_what_is_in_no_layer_is_moved_to_the_device_at_once() -> None:
    encoder = tiny_qwen3(Qwen3ForCausalLM)
    with Moved() as moved:
        offload_layers(encoder, torch.device("cpu"))
    waiting = {each.data_ptr() for layer in repeated_layers(encoder) for each in layer.parameters()}
    everything = {each.data_ptr() for each in (*encoder.parameters(), *encoder.buffers())}
    assert len(waiting) > 10
    assert moved.places == everything - waiting


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux", "z_image"])
def test_the_plan_counts_one_layer_and_what_is_in_none(name: str, tmp_path: Path) -> None:
    family = family_of(name, TINY_FOLDERS[name](tmp_path / "model"))
    whole = encoding_cost(family, PROMPTS)
    family.number_formats = replace(family.number_formats, offloads_encoders=True)
    offloaded = encoding_cost(family, PROMPTS)
    assert whole is not None
    assert offloaded is not None
    assert whole.activation_bytes == offloaded.activation_bytes
    waiting = 0
    for encoder in encoders_of(family):
        sizes = [num_bytes(layer) for layer in repeated_layers(encoder)]
        waiting += sum(sizes) - max(sizes)
    assert whole.weight_bytes - offloaded.weight_bytes == waiting > 0
