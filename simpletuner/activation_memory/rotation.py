"""Rotary position embedding that is one complex product, and whose gradient is the rotation back.

Su et al., "RoFormer" (arXiv 2104.09864). diffusers' function for pairs of neighboring channels (FLUX.1, FLUX.2, Chroma,
Krea 2) is a dozen kernels in float32, and its gradient more. Here the bits are the same for heads of a multiple of 16
channels; in others a CPU rounds the last products of float32 differently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simpletuner.activation_memory.recompute import dispatched, widened

NAME = "apply_rotary_emb"


class Rotation(torch.autograd.Function):
    """`turn(states, cos, sin, direction)` with 1 forward, with -1 for the gradient."""

    @staticmethod
    def forward(ctx: Any, turn: Callable[..., Tensor], states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.turn = turn
        ctx.save_for_backward(cos, sin)
        return turn(states, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, ctx.turn(gradient, *ctx.saved_tensors, -1), None, None


def rotate_as_one_product(module: nn.Module) -> None:
    """Let the attention processor of a module, if it calls diffusers' `apply_rotary_emb`, call the one below."""
    from diffusers.models.embeddings import apply_rotary_emb as published

    processor: Any = getattr(module, "processor", None)
    kind: Any = type(processor)
    call = vars(kind).get("__call__")
    if isinstance(call, FunctionType) and call.__globals__.get(NAME) is published:
        processor.__class__ = _rotating(kind)


@cache
def _rotating(processor: type[Any]) -> type[Any]:
    """The class with the same code in its `__call__`, where the name of diffusers' function means ours."""
    call = processor.__call__
    names = {**call.__globals__, NAME: apply_rotary_emb}
    rebound = FunctionType(call.__code__, names, call.__name__, call.__defaults__, call.__closure__)
    return type(processor.__name__, (processor,), {"__call__": rebound, "__module__": processor.__module__})


def apply_rotary_emb(
    x: Tensor, freqs_cis: Any, use_real: bool = True, use_real_unbind_dim: int = -1, sequence_dim: int = 2
) -> Tensor:
    """As diffusers' function of this name.

    Args:
        x: (B, heads, S, D), or (B, S, heads, D) with `sequence_dim` 1.
        freqs_cis: cosines and sines, (S, D) each, equal for both channels of a pair.
    """
    is_counted = x.device.type == "meta"  # `plan` and its presets count what diffusers' function makes: a little more
    if not use_real or use_real_unbind_dim != -1 or is_counted or torch.compiler.is_compiling():
        from diffusers.models.embeddings import apply_rotary_emb as published

        turned: Any = published(x, freqs_cis, use_real, use_real_unbind_dim, sequence_dim)  # it says two tensors
        return turned
    cos, sin = (each.to(x.device).unsqueeze(-2 if sequence_dim == 1 else 0) for each in freqs_cis)
    return rotate_pairs(x, cos, sin)


@dispatched
def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., D) rotated by angles whose cosines and sines are alike in both channels of a pair."""
    return Rotation.apply(_turn_pairs, x, cos, sin)


def _turn_pairs(x: Tensor, cos: Tensor, sin: Tensor, direction: int) -> Tensor:
    angles = torch.complex(widened(cos[..., ::2]), direction * widened(sin[..., ::2]))
    wide = widened(x)
    if any(stride % 2 for stride in wide.stride()[:-1]) or wide.stride(-1) != 1:  # a gradient may be one number for all
        wide = wide.contiguous()
    turned = torch.empty_like(wide)  # the result itself: blocks make nothing again that is a view of another tensor
    torch.mul(_pairs(wide), angles, out=_pairs(turned))
    return turned.to(x.dtype)


def _pairs(x: Tensor) -> Tensor:
    """(..., D) real -> (..., D / 2) complex, of the same memory."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))
