"""What Qwen2.5-VL is given for an edit: a chat in which reference images stand in front of the instruction.

Made of the tokenizer and the image processor without torchvision, which transformers' own processor asks for. The
model is told which tokens are of an image (`mm_token_type_ids`): without them it takes the rows and columns of an image
for a line of text, as the pipelines of diffusers 0.42 do with transformers 5 (huggingface/diffusers issue 14194).
Source: `pipeline_qwenimage_edit.py` and `pipeline_qwenimage_edit_plus.py` of diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from simpletuner.models.hidden_states import hidden_states

TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
# Tokens of the template before the user's turn; their states are not text for the denoiser.
TEMPLATE_TOKENS = 64
IMAGE_TOKEN = "<|image_pad|>"
IMAGE_TAGS = f"<|vision_start|>{IMAGE_TOKEN}<|vision_end|>"
# Sides that the language model sees are multiples of this, before its own processor cuts them into patches.
SIDE_MULTIPLE = 32


def chat_text(instruction: str, num_images: int, labels: bool) -> str:
    """The whole chat for an instruction behind `num_images` images.

    Args:
        labels: each image is announced as "Picture 1: ", "Picture 2: ".
    """
    tags = [(f"Picture {number}: " if labels else "") + IMAGE_TAGS for number in range(1, num_images + 1)]
    return TEMPLATE.format("".join(tags) + instruction)


def size_of_area(width: int, height: int, area: int) -> tuple[int, int]:
    """(width, height) of about `area` pixels, nearly as wide for its height, in multiples of 32."""
    ratio = width / height
    exact_width = (area * ratio) ** 0.5
    exact_height = exact_width / ratio
    rounded = (max(1, round(side / SIDE_MULTIPLE)) * SIDE_MULTIPLE for side in (exact_width, exact_height))
    width, height = rounded
    return width, height


def fit_to_area(image: Image.Image, area: int) -> Image.Image:
    """An image of about `area` pixels, stretched by less than a multiple of its sides."""
    size = size_of_area(image.width, image.height, area)
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def encoder_inputs(
    tokenizer: Any, image_processor: Any, text: str, images: Sequence[Image.Image], max_tokens: int | None = None
) -> dict[str, Tensor]:
    """What the language model is called with, for one chat.

    Args:
        text: of `chat_text`, with as many image tags as there are images.
        images: in the size that the model should see; the processor rounds it to its patches.
        max_tokens: longer chats lose their end; an image counts as one token.

    Returns:
        `input_ids` and `mm_token_type_ids` (1, L), with images also `pixel_values` and `image_grid_thw`.
    """
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ids = tokenizer(text, truncation=max_tokens is not None, max_length=max_tokens).input_ids
    inputs: dict[str, Tensor] = {}
    lengths: list[int] = []
    if images:
        made = image_processor(images=[image.convert("RGB") for image in images], return_tensors="pt")
        inputs = {"pixel_values": made["pixel_values"], "image_grid_thw": made["image_grid_thw"]}
        lengths = (made["image_grid_thw"].prod(dim=-1) // image_processor.merge_size**2).tolist()
    if ids.count(image_token) != len(lengths):
        raise ValueError(f"the chat has {ids.count(image_token)} image tokens for {len(lengths)} images")
    remaining = iter(lengths)
    expanded = [token for each in ids for token in [each] * (next(remaining) if each == image_token else 1)]
    input_ids = torch.tensor([expanded])
    return {"input_ids": input_ids, "mm_token_type_ids": (input_ids == image_token).int(), **inputs}


def prompt_states(encoder: Any, inputs: dict[str, Tensor], device: torch.device) -> Tensor:
    """(L, D) on the CPU: the last states of the user's turn and what follows it.

    Args:
        encoder: Qwen2.5-VL, with or without its head.
        inputs: of `encoder_inputs`.
        device: of the encoder.
    """
    states = hidden_states(
        encoder, [-1], final_norm=True, **{name: tensor.to(device) for name, tensor in inputs.items()}
    )
    return states[0, TEMPLATE_TOKENS:, 0].cpu()
