"""Prompts that are longer than CLIP reads at once: chunks of 75 tokens, each between a begin and an end.

As A1111, ComfyUI and kohya's scripts do it: the states of the chunks stand one after the other, with the begin of the
first and the end of the last, and what stands for the whole prompt is the pooled vector of the first. Every prompt has
the same number of chunks, the further ones of a short prompt being those of an empty text, so that prompts and negative
prompts have one shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from simpletuner.models.clip_lengths import CHUNK, WINDOW


def chunk_ids(tokenizer: Any, prompts: Sequence[str], length: int) -> Tensor:
    """(B, N, 77) tokens of prompts that are cut to `length`, which is 75 N + 2."""
    rows = []
    for ids in tokenizer(list(prompts), add_special_tokens=False, verbose=False).input_ids:
        for start in range(0, length - 2, CHUNK):
            row = [tokenizer.bos_token_id, *ids[start : start + CHUNK], tokenizer.eos_token_id]
            rows.append(row + [tokenizer.pad_token_id] * (WINDOW - len(row)))
    return torch.tensor(rows).view(len(prompts), -1, WINDOW)


def join_chunks(states: Tensor, num_prompts: int) -> Tensor:
    """(B * N, 77, D) states of all chunks -> (B, 75 N + 2, D)."""
    chunks = states.unflatten(0, (num_prompts, -1))
    return torch.cat([chunks[:, 0, :1], chunks[:, :, 1:-1].flatten(1, 2), chunks[:, -1, -1:]], dim=1)
