"""What encoding captions takes is known from shapes: without weights, the real embeddings' names, sizes and formats."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.text_encoders import TextEncoders
from simpletuner.training.planning.encoding import blank_image, encoding_cost
from tests.tiny_folders import TINY_FOLDERS

PROMPTS = ["a cat", "a green star on a white background"]
ENCODING = [name for name in family_names() if get_spec(name).caches_prompt_embeds]
# Its encoder picks the states of images by a mask, whose values it needs.
NOT_KNOWN = ("qwen_image_21",)
SLOW = ("krea2", "qwen_image_edit")  # 36 layers, and an encoder of images


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in ENCODING])
def test_embeddings_from_shapes_are_like_the_real_ones(name: str, tmp_path: Path, monkeypatch) -> None:
    spec = get_spec(name)
    source = ModelSource(str(TINY_FOLDERS[name](tmp_path / "model")))
    family = get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)
    images = [[blank_image(64, 96)]] * 2 if spec.prompts_see_references else None
    with monkeypatch.context() as patch:
        patch.setattr(TextEncoders, "encoder", lambda self, name="text_encoder": pytest.fail("loaded"))
        cost = encoding_cost(family, PROMPTS, images)
    if name in NOT_KNOWN:
        assert cost is None
        return
    real = family.encode_prompts(PROMPTS, images)
    assert cost is not None
    for found, expected in zip(cost.embeds, real, strict=True):
        assert found.tensors.keys() == expected.tensors.keys()
        for key, tensor in expected.tensors.items():
            assert (found.tensors[key].shape, found.tensors[key].dtype) == (tensor.shape, tensor.dtype), key
    assert cost.caption_bytes == max(sum(tensor.nbytes for tensor in each.tensors.values()) for each in real)
    encoders = [family.encoders.encoder(part.name) for part in spec.components if part.role == "text_encoder"]
    weights = sum(each.numel() * each.element_size() for encoder in encoders for each in encoder.parameters())
    assert weights <= cost.weight_bytes < 1.1 * weights + 20_000  # and buffers
    assert cost.activation_bytes > 0
