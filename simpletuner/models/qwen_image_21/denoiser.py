"""Qwen-Image 2.1's network with the layout of its sequence known on the host.

diffusers' forward pass finds the places of images among the tokens by reading a mask back from the device, several
times in each pass, and cannot run on torch's `meta` device. Here the same sequence is put together from numbers that
the host knows. Blocks, embeddings and the output are diffusers' own.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.transformers import transformer_qwenimage21 as published
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope, _qwenimage21_prefix_segments
from torch import Tensor

from simpletuner.models.family import send

# Latents of an image for which the text has one token: 2 x 2.
LATENTS_PER_SLOT = 4
Shapes = tuple[tuple[int, int, int], ...]


class QwenImage21Transformer2DModel(published.QwenImage21Transformer2DModel):
    """diffusers' network, under its name, with another way through it."""

    config: Any
    _gradient_checkpointing_func: Any

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        timestep: Tensor,
        img_shapes: Shapes,
        image_starts: Sequence[int] = (),
        return_dict: bool = False,
        **_: Any,
    ) -> tuple[Tensor]:
        """(B, n, C): the answer for the n tokens of the image that is generated.

        Args:
            hidden_states: (B, tokens, C) those of the references, then those of the image.
            encoder_hidden_states: (B, L, D), without padding.
            timestep: (B,) sigmas.
            img_shapes: (1, h, w) of each image, in the same order; the same for all rows.
            image_starts: for each reference the place in the text of the first token that stands for it.
        """
        device, dtype = hidden_states.device, hidden_states.dtype
        num_tokens = [math.prod(shape) for shape in img_shapes]
        *references, target = self.img_in(hidden_states).split(num_tokens, dim=1)
        text = self.txt_in(encoder_hidden_states)
        pieces, cursor = [], 0
        for start, reference in zip(image_starts, references, strict=True):
            pieces += [text[:, cursor:start], reference]
            cursor = start + reference.shape[1] // LATENTS_PER_SLOT
        joint = torch.cat([*pieces, text[:, cursor:], target], dim=1)

        image_ids = _image_ids(text.shape[1], tuple(num_tokens), tuple(image_starts))
        prefix = len(image_ids) - num_tokens[-1]
        rotations = send(_rotations(tuple(self.config.axes_dims_rope), img_shapes, image_ids), device)
        segments = _qwenimage21_prefix_segments(torch.tensor(image_ids), prefix)
        is_target = None
        timestep = timestep.to(dtype)
        if self.config.causal_condition:  # text and references are modulated as at time 0
            timestep = torch.cat([timestep, timestep.new_zeros(1)])
            is_target = torch.arange(len(image_ids), device=device) >= prefix
        temb = self.time_text_embed(timestep, joint)
        modulation = self.modulation(temb)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                arguments = (modulation, rotations, None, is_target, None, None, None, segments, None)
                joint = self._gradient_checkpointing_func(block, joint, *arguments)
            else:
                joint = block(joint, modulation, rotary_emb=rotations, target_token_mask=is_target, segments=segments)
        return (self.proj_out(self.norm_out(joint, temb, is_target))[:, prefix:],)


@functools.lru_cache(maxsize=64)
def _image_ids(num_text: int, num_tokens: tuple[int, ...], starts: tuple[int, ...]) -> tuple[int, ...]:
    """For each token of the sequence the number of its image, -1 for text."""
    ids: list[int] = []
    cursor = 0
    for number, (start, count) in enumerate(zip((*starts, num_text), num_tokens, strict=True)):
        ids += [-1] * (start - cursor) + [number] * count
        cursor = start + count // LATENTS_PER_SLOT
    return tuple(ids)


@functools.lru_cache(maxsize=16)
def _rotations(axes: tuple[int, ...], shapes: Shapes, image_ids: tuple[int, ...]) -> Tensor:
    """(tokens, D) complex, on the CPU, by diffusers' own embedding."""
    is_image = torch.tensor(image_ids, device="cpu") >= 0
    return _embedding(axes)(list(shapes), is_image, device=torch.device("cpu"))


@functools.lru_cache(maxsize=4)
def _embedding(axes: tuple[int, ...]) -> QwenImage21Rope:
    with torch.device("cpu"):
        return QwenImage21Rope(theta=10000, axes_dim=list(axes))
