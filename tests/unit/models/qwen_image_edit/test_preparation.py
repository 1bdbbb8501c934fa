"""What Qwen2.5-VL is given for an edit, and what it says: golden states, token layouts and sizes of diffusers."""

from __future__ import annotations

import json
from itertools import groupby
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from simpletuner.models.qwen_image_edit.preparation import (
    IMAGE_TOKEN,
    TEMPLATE_TOKENS,
    chat_text,
    encoder_inputs,
    fit_to_area,
    prompt_states,
    size_of_area,
)
from tests.golden_qwen_image import FOLDER, assert_near

CPU = torch.device("cpu")
PROMPTS = json.loads((FOLDER / "vlm" / "prompts.json").read_text())
LAYOUTS = [
    case
    for case in json.loads((FOLDER / "token_layouts.json").read_text())["cases"]
    if case.get("drop") == TEMPLATE_TOKENS and "images" in case
]


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, Any]:
    folder = FOLDER / "vlm"
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    return AutoTokenizer.from_pretrained(folder / "tokenizer"), processor(), encoder


def processor() -> Any:
    return Qwen2VLImageProcessorPil.from_pretrained(FOLDER / "vlm" / "processor")


def golden(number: int) -> tuple[dict[str, Tensor], list[Image.Image], str]:
    """The tensors of a prompt, its images, and the instruction in it."""
    facts = PROMPTS[number]
    tensors = load_file(FOLDER / "vlm" / facts["file"])
    images = [Image.fromarray(tensors[f"image.{k}"].numpy()) for k in range(len(facts["image_sizes"]))]
    return tensors, images, "swap the colours"


@pytest.mark.parametrize(("number", "labels"), [(2, False), (3, True), (4, True)])
def test_the_states_are_those_of_the_model_that_knows_where_the_images_are(
    parts: tuple[Any, Any, Any], number: int, labels: bool
) -> None:
    tokenizer, image_processor, encoder = parts
    tensors, images, instruction = golden(number)
    text = chat_text(instruction, len(images), labels)
    assert text == PROMPTS[number]["text"]
    inputs = encoder_inputs(tokenizer, image_processor, text, images)
    assert torch.equal(inputs["input_ids"].flatten(), tensors["input_ids"].flatten())
    assert torch.equal(inputs["mm_token_type_ids"].flatten(), tensors["token_types"].flatten())
    states = prompt_states(encoder, inputs, CPU)
    assert_near(states, tensors["prompt_embeds"])
    if images:
        torch.testing.assert_close(inputs["pixel_values"], tensors["pixel_values"], rtol=0, atol=1e-5)
        assert torch.equal(inputs["image_grid_thw"], tensors["image_grid_thw"])
        assert (states - tensors["prompt_embeds_without_token_types"]).abs().max() > 0.5


def test_a_text_alone_is_read_the_same_after_a_text_with_images(parts: tuple[Any, Any, Any]) -> None:
    """The model keeps the offset of its last positions."""
    tokenizer, image_processor, encoder = parts
    plain = encoder_inputs(tokenizer, image_processor, chat_text("a cat", 0, True), [])
    before = prompt_states(encoder, plain, CPU)
    _, images, _ = golden(2)
    prompt_states(encoder, encoder_inputs(tokenizer, image_processor, chat_text("a cat", 1, True), images), CPU)
    assert torch.equal(prompt_states(encoder, plain, CPU), before)


class Tokenizer:
    """Stands for the released one: the ids of one text, its images as one token each."""

    def __init__(self, text: str, ids: list[int], image_token: int):
        self.text, self.ids, self.image_token = text, ids, image_token

    def convert_tokens_to_ids(self, token: str) -> int:
        assert token == IMAGE_TOKEN
        return self.image_token

    def __call__(self, text: str, **options: Any) -> Any:
        assert text == self.text
        return type("Tokens", (), {"input_ids": self.ids})


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout["name"])
def test_the_layout_of_tokens_and_the_sizes_of_images_are_those_of_the_release(layout: dict[str, Any]) -> None:
    ids = layout["input_ids"] or [token for token, count in layout["input_ids_runs"] for _ in range(count)]
    image_token, end = 151655, "<|im_end|>\n<|im_start|>assistant\n"
    instruction = layout["template_text"].rpartition("<|vision_end|>")[2].removesuffix(end)
    labels = "QwenImageEditPlusPipeline" in layout["name"]
    assert chat_text(instruction, len(layout["images"]), labels) == layout["template_text"]
    single = [token for token, run in groupby(ids) for token in ([token] if token == image_token else run)]
    images = [Image.new("RGB", tuple(each["picture"])) for each in layout["images"]]
    area = 1024 * 1024 if "QwenImageEditPipeline" in layout["name"] else 384 * 384
    seen = [fit_to_area(image, area) for image in images]
    assert [list(image.size) for image in seen] == [each["shown_to_vlm"] for each in layout["images"]]
    tokenizer = Tokenizer(layout["template_text"], single, image_token)
    big = processor()
    big.size = {"shortest_edge": 56 * 56, "longest_edge": 12845056}
    inputs = encoder_inputs(tokenizer, big, layout["template_text"], seen)
    assert inputs["input_ids"][0].tolist() == ids
    assert len(ids) == layout["num_tokens"]
    assert inputs["mm_token_type_ids"].sum() == ids.count(image_token)


@pytest.mark.parametrize(
    ("size", "area", "expected"),
    [((1024, 768), 384**2, (448, 320)), ((640, 960), 384**2, (320, 480)), ((1024, 768), 1024**2, (1184, 896))],
)
def test_an_image_is_brought_to_an_area_in_multiples_of_32(
    size: tuple[int, int], area: int, expected: tuple[int, int]
) -> None:
    assert size_of_area(*size, area) == expected
    assert fit_to_area(Image.new("RGB", size), area).size == expected


def test_a_narrow_image_keeps_one_row_of_patches() -> None:
    assert size_of_area(10000, 10, 384**2)[1] == 32


def test_a_chat_has_a_tag_for_each_image(parts: tuple[Any, Any, Any]) -> None:
    tokenizer, image_processor, _ = parts
    with pytest.raises(ValueError, match="2 image tokens for 1 images"):
        encoder_inputs(tokenizer, image_processor, chat_text("a", 2, False), [Image.new("RGB", (56, 56))])
