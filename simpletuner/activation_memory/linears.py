"""A trained linear layer that keeps what its input is made of, where that is kept anyway."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simpletuner.activation_memory.recompute import cast, computing_dtype, exact_dtypes, recompute_fn_of


def use_recomputing_linears(modules: Iterable[nn.Module]) -> None:
    """Let those of the modules that are torch's own `nn.Linear` compute by `linear`; parameters and keys stay."""
    for module in modules:
        if type(module) is nn.Linear:
            setattr(module, "forward", MethodType(_forward, module))  # noqa: B010 - of this layer alone


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the dtype of `x`, or autocast's, whatever dtype the weight is stored in.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,).

    Returns:
        (..., out).
    """
    dtype = computing_dtype(x)
    x, weight = cast(x, dtype), weight.to(dtype)
    bias = None if bias is None else bias.to(dtype)
    recipe = recompute_fn_of(x)
    if not (weight.requires_grad and torch.is_grad_enabled()) or recipe.ingredients[0] is x:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, recipe.make, weight, bias, *recipe.ingredients)


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, self.weight, self.bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, make: Any, weight: Tensor, bias: Tensor | None, *ingredients: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(weight, *ingredients)
        with exact_dtypes(x.device.type):
            return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, *ingredients = ctx.saved_tensors
        needs_x, _, needs_weight, needs_bias = ctx.needs_input_grad[:4]
        rows = gradient.flatten(0, -2)
        with exact_dtypes(gradient.device.type):
            to_x = gradient @ weight if needs_x else None
            to_weight = rows.mT @ ctx.make(*ingredients).flatten(0, -2) if needs_weight else None
            to_bias = rows.sum(0) if needs_bias else None
        return to_x, None, to_weight, to_bias, *(None for _ in ingredients)
