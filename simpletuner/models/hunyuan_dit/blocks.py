"""What diffusers' Hunyuan-DiT lacks: gradient checkpointing by block, and times that half precision does not round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.transformers import hunyuan_transformer_2d
from torch import Tensor, nn

# The inputs of a block after the first one, in the order of its forward pass.
_NAMES = ("encoder_hidden_states", "temb", "image_rotary_emb", "skip")


class HunyuanDiTBlock(hunyuan_transformer_2d.HunyuanDiTBlock):
    """The denoiser calls it by keywords; gradient checkpointing, which then comes between, by position.

    diffusers' `enable_gradient_checkpointing` sets both attributes.
    """

    gradient_checkpointing: bool = False
    _gradient_checkpointing_func: Callable[..., Tensor]

    def __call__(self, *inputs: Any, **named: Any) -> Tensor:
        if named and self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(self, *inputs, *(named.get(name) for name in _NAMES))
        return super().__call__(*inputs, **named)


def prepare(denoiser: Any) -> nn.Module:
    """Let the denoiser's blocks be recomputed, and its time and sizes come in float32; returns the denoiser."""
    for block in denoiser.blocks:
        block.__class__ = HunyuanDiTBlock
    denoiser._supports_gradient_checkpointing = True
    denoiser.time_extra_emb.register_forward_pre_hook(_embed_in_the_dtype_of_weights, with_kwargs=True)
    denoiser.pos_embed.register_forward_pre_hook(_latents_in_the_dtype_of_weights)
    return denoiser


def _embed_in_the_dtype_of_weights(module: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The denoiser takes the dtype of its time for that of the weights, and bfloat16 knows no 999."""
    return inputs, {**named, "hidden_dtype": module.pooler.positional_embedding.dtype}


def _latents_in_the_dtype_of_weights(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Sampling keeps its latents in float32, and its times with them."""
    return (inputs[0].to(module.proj.weight.dtype), *inputs[1:])
