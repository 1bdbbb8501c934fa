"""The tokenizer that Qwen-Image and OmniGen2 are released with, from the public vocabulary of Qwen2.

The wheel `dashscope` of the `dev` extra holds it (`qwen.tiktoken`); nothing of the wheel is imported.
"""

from __future__ import annotations

import base64
import importlib.util
from pathlib import Path

import pytest
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

# Behind the 151,643 pieces of bytes, in the order of their ids.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)


class _Converter(TikTokenConverter):
    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        """Without the package `tiktoken`: a line is a piece of bytes in base64, and its rank."""
        lines = [line.split() for line in Path(tiktoken_url).read_bytes().splitlines()]
        return {base64.b64decode(piece): int(rank) for piece, rank in lines}


def released_tokenizer() -> Qwen2Tokenizer:
    """Skips the test where the wheel is not installed."""
    package = importlib.util.find_spec("dashscope")
    if package is None or package.origin is None:
        pytest.skip("the vocabulary of Qwen2 is not here: dashscope is not installed (the dev extra has it)")
    file = Path(package.origin).with_name("resources") / "qwen.tiktoken"
    vocabulary, merges = _Converter(str(file)).extract_vocab_merges_from_model(str(file))
    vocabulary |= {token: len(vocabulary) + place for place, token in enumerate(SPECIAL_TOKENS)}
    return Qwen2Tokenizer(vocabulary, merges, extra_special_tokens=[*SPECIAL_TOKENS])
