"""Qwen-Image 2.1's network with the layout of its sequence known on the host.

diffusers' forward pass reads from the device, several times, which tokens are of images, and cannot run on `meta`.
Here the same layout is made on the CPU. Blocks, embeddings and the output are diffusers' own.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from diffusers.models.transformers import transformer_qwenimage21 as published
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21Rope, _qwenimage21_prefix_segments
from torch import Tensor

from simpletuner.models.family import send

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
        image_slots: tuple[bool, ...],
        **_: Any,
    ) -> tuple[Tensor]:
        """(B, n, C): the output for the n tokens of the image that is generated; all rows have one layout.

        Args:
            hidden_states: (B, tokens, C) those of the references, then those of the image.
            img_shapes: (1, h, w) of each image, in the same order.
            image_slots: whether each token of the text, which is not padded, stands for a reference.

        Raises:
            ValueError: the text was encoded with other references, or with references of other sizes.
        """
        *layout, segments = _layout(image_slots, img_shapes, tuple(self.config.axes_dims_rope))
        order, is_target, rotations = (send(each, hidden_states.device) for each in layout)
        tokens = torch.cat([self.txt_in(encoder_hidden_states), self.img_in(hidden_states)], dim=1)
        joint, timestep, mask = tokens.index_select(1, order), timestep.to(hidden_states.dtype), None
        if self.config.causal_condition:  # text and references are modulated as at time 0
            timestep, mask = torch.cat([timestep, timestep.new_zeros(1)]), is_target
        temb = self.time_text_embed(timestep, joint)
        inputs = (self.modulation(temb), rotations, None, mask, None, None, None, segments, None)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                joint = self._gradient_checkpointing_func(block, joint, *inputs)
            else:
                joint = block(joint, *inputs)
        return (self.proj_out(self.norm_out(joint, temb, mask))[:, -math.prod(img_shapes[-1]) :],)


@functools.lru_cache(maxsize=16)
def _layout(slots: tuple[bool, ...], shapes: Shapes, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, list[Any]]:
    """As diffusers' forward pass works it out, on the CPU: the place of each token in the text with all images behind
    it, whether it is of the generated image, its rotation; and the runs of one text or image before that image."""
    num_target = math.prod(shapes[-1])
    with torch.device("cpu"):
        is_slot = torch.tensor((*slots, *[True] * (num_target // 4)), dtype=torch.bool)  # one token for 2 x 2 latents
        is_image = is_slot.repeat_interleave(torch.where(is_slot, 4, 1))
        image_ids, is_target = QwenImage21Transformer2DModel.build_token_metadata(is_image, list(shapes))
        order = torch.empty_like(image_ids)
        order[~is_image] = (~is_slot).nonzero()[:, 0]
        order[is_image] = len(slots) + torch.arange(int(is_image.sum()))
        rotations = QwenImage21Rope(10000, list(axes))(list(shapes), is_image, torch.device("cpu"))
    return order, is_target, rotations, _qwenimage21_prefix_segments(image_ids, len(image_ids) - num_target)
