"""The ids that language models are given with the released vocabulary: those of the public pipelines, to the token."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Qwen2Tokenizer

from simpletuner.batch import PromptImage
from simpletuner.models import text_encoders
from simpletuner.models.family import ModelFamily
from simpletuner.models.qwen_image_edit import preparation
from tests.golden_cases import family_of
from tests.golden_qwen_image import FOLDER
from tests.qwen_vocabulary import released_tokenizer
from tests.tiny_omnigen2 import tiny_omnigen2_folder
from tests.tiny_qwen_image import tiny_qwen_image_edit_folder, tiny_qwen_image_folder

LAYOUTS = {case["name"]: case for case in json.loads((FOLDER / "token_layouts.json").read_text())["cases"]}
SIGN = "A cat holding a sign"
OneImage = partial(tiny_qwen_image_edit_folder, pipeline_class="QwenImageEditPipeline")


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return released_tokenizer()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that language models are given, in place of their states."""
    seen: list[list[int]] = []

    def note(encoder: Any, layers: Any, final_norm: bool = True, *, input_ids: Tensor, **inputs: Any) -> Tensor:
        seen.append(input_ids[0].tolist())
        return torch.zeros(1, input_ids.shape[1], len(layers), 4)

    for module in (text_encoders, preparation):
        monkeypatch.setattr(module, "hidden_states", note)
    return seen


def released(name: str, folder: Path, tokenizer: Qwen2Tokenizer) -> ModelFamily:
    """A tiny model with the released tokenizer, which OmniGen2 keeps beside its image processor."""
    family = family_of(name, folder)
    family.encoders._tokenizers["processor" if name == "omnigen2" else "tokenizer"] = tokenizer
    return family


@pytest.mark.parametrize(
    ("name", "make", "prompt", "layout"),
    [
        ("qwen_image", tiny_qwen_image_folder, SIGN, "QwenImagePipeline, text only"),
        ("qwen_image", tiny_qwen_image_folder, "", "QwenImagePipeline, empty prompt"),
        ("qwen_image", tiny_qwen_image_folder, " ", "QwenImagePipeline, negative prompt of one space"),
        (
            "qwen_image_edit",
            OneImage,
            None,
            "QwenImageEditPipeline, one picture (VLM sees 1024*1024 area)",
        ),
        (
            "qwen_image_edit",
            tiny_qwen_image_edit_folder,
            None,
            "QwenImageEditPlusPipeline, two pictures (384*384 area each)",
        ),
        ("omnigen2", tiny_omnigen2_folder, "add a hat to the person", "OmniGen2, prompt"),
        ("omnigen2", tiny_omnigen2_folder, None, "OmniGen2, dropped prompt (training)"),
        ("omnigen2", tiny_omnigen2_folder, "", "OmniGen2, empty negative prompt (pipeline)"),
    ],
)
def test_a_prompt_has_the_ids_of_the_public_pipeline(
    name: str,
    make: Callable[[Path], Path],
    prompt: str | None,
    layout: str,
    tmp_path: Path,
    tokenizer: Qwen2Tokenizer,
    read: list[list[int]],
) -> None:
    family, facts = released(name, make(tmp_path), tokenizer), LAYOUTS[layout]
    runs = facts.get("input_ids_runs") or [[token, 1] for token in facts["input_ids"]]
    images = [PromptImage.of(Image.new("RGB", tuple(each["picture"]))) for each in facts.get("images", ())]
    if prompt is None:  # the instruction behind the images, or what stands for a dropped one
        end = "<|im_end|>\n<|im_start|>assistant\n"
        instruction = facts["template_text"].rpartition("<|vision_end|>")[2].removesuffix(end)
        prompt = instruction if images else family.spec.dropped_caption
    [embeds] = family.encode_prompts([prompt], [images] if images else None)
    assert read == [[token for token, count in runs for _ in range(count)]]
    assert len(embeds.tensors["prompt_embeds"]) == facts["num_tokens"] - facts["drop"]


def test_a_prompt_of_many_words_loses_what_is_behind_its_first_512_tokens(
    tmp_path: Path, tokenizer: Qwen2Tokenizer, read: list[list[int]]
) -> None:
    """`sign` is one token, with the blank before it another one; 34 tokens of the template stand before them."""
    family = released("qwen_image", tiny_qwen_image_folder(tmp_path), tokenizer)
    [embeds] = family.encode_prompts(["sign" + " sign" * 600])
    assert len(embeds.tensors["prompt_embeds"]) == 512
    assert read[0][34:36] == [7752, 1841]
    assert read[0][36:] == [1841] * 510
    assert family.count_prompt_tokens(["sign" + " sign" * 600]) == [606]
    assert family.num_cut_prompts == 1
