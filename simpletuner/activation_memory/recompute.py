"""Tensors that need not be kept, because they are cheap to make again from what is kept anyway.

A tensor can carry its recipe: a function and the tensors that it was made of. Who would save the tensor for its
backward pass saves the ingredients instead. A recipe is a plain attribute of the tensor; where it gets lost (a view, a
hook that wraps the tensor), the tensor itself is saved, as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ATTRIBUTE = "_simpletuner_recipe"

# Bytes of a tensor from which on memory is worth the time of Python: keeping little costs some 50 us per function.
LARGE = 1 << 20


class RecomputeFn(NamedTuple):
    """How to make a tensor again.

    Args:
        make: a pure function of the ingredients.
        ingredients: tensors that are kept for other reasons.
        version: of the tensor that was made; one that was changed in place since is another tensor.
    """

    make: Callable[..., Tensor]
    ingredients: tuple[Tensor, ...]
    version: int = 0


def is_worth_it(x: Tensor) -> bool:
    """Whether a computation on `x` shall keep little: not of a small tensor, for a compiler, or without gradients."""
    is_seen_by_autograd = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return is_seen_by_autograd and x.numel() * x.element_size() >= LARGE


def set_recompute_fn(tensor: Tensor, make: Callable[..., Tensor], *ingredients: Tensor) -> Tensor:
    """Let `tensor` carry its recipe, where that is worth it; returns it."""
    if tensor.requires_grad and is_worth_it(tensor):
        setattr(tensor, _ATTRIBUTE, RecomputeFn(make, ingredients, tensor._version))
    return tensor


def recompute_fn_of(tensor: Tensor) -> RecomputeFn:
    """The recipe of a tensor; of one that has none, the tensor itself."""
    recipe = getattr(tensor, _ATTRIBUTE, None)
    if recipe is None or recipe.version != tensor._version:
        return RecomputeFn(_itself, (tensor,))
    return recipe


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, made by the same recipe."""
    if tensor.dtype == dtype:
        return tensor
    recipe = recompute_fn_of(tensor)
    converted = tensor.to(dtype)
    if recipe.make is _itself:
        return converted
    return set_recompute_fn(converted, lambda *ingredients: recipe.make(*ingredients).to(dtype), *recipe.ingredients)


def recomputed(make: Callable[..., Tensor], *ingredients: Tensor) -> Tensor:
    """`make(*ingredients)`, of which only the ingredients are kept: it is made again in the backward pass.

    For pure functions that cost little: one that reads the global random state or a module's buffers does not belong
    here. Parameters among the ingredients get their gradients.
    """
    if not is_worth_it(ingredients[0]):
        with exact_dtypes(ingredients[0].device.type):  # as for large ones
            return make(*ingredients)
    return set_recompute_fn(_Recomputed.apply(make, *ingredients), make, *ingredients)


def computing_dtype(x: Tensor) -> torch.dtype:
    """In which a product of `x` is computed here: autocast's, where that is on."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def exact_dtypes(kind: str) -> AbstractContextManager[Any]:
    """Inside, autocast changes no dtype on devices of this kind: what is made twice must come out the same."""
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, make: Callable[..., Tensor], *ingredients: Tensor) -> Tensor:
        ctx.make = make
        ctx.save_for_backward(*ingredients)
        with exact_dtypes(ingredients[0].device.type):
            return make(*ingredients)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        ingredients = [
            tensor.detach().requires_grad_(needs) for tensor, needs in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad(), exact_dtypes(gradient.device.type):
            output = ctx.make(*ingredients)
        wanted = [tensor for tensor in ingredients if tensor.requires_grad]
        gradients = iter(torch.autograd.grad(output, wanted, gradient))
        return None, *(next(gradients) if needs else None for needs in needed)


def _itself(tensor: Tensor) -> Tensor:
    return tensor
