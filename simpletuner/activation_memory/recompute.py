"""Functions of which only the inputs are kept, for what torch itself computes in several operations.

Where a block is traced (`tracing.py`), their outputs are made again like those of torch's own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

# Bytes of a tensor from which on memory is worth the time of Python: keeping little costs some 50 us per function.
LARGE = 1 << 20

P = ParamSpec("P")


def is_large(tensor: Tensor) -> bool:
    return tensor.numel() * tensor.element_size() >= LARGE


def is_worth_it(x: Tensor) -> bool:
    """Whether a computation on `x` shall keep little: not of a small tensor, for a compiler, or without gradients."""
    is_seen_by_autograd = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    return is_seen_by_autograd and is_large(x)


def dispatched(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Let a function of tensors be seen by modes of `__torch_function__` as one, as torch's own are."""

    @wraps(function)
    def seen(*inputs: P.args, **options: P.kwargs) -> Tensor:
        tensors = tuple(each for each in inputs if isinstance(each, Tensor))
        if not torch.compiler.is_compiling() and has_torch_function(tensors):
            return handle_torch_function(seen, tensors, *inputs, **options)
        return function(*inputs, **options)

    return seen


@dispatched
def recomputed(make: Callable[..., Tensor], *ingredients: Tensor) -> Tensor:
    """`make(*ingredients)`, of which only the ingredients are kept: it is made again in the backward pass.

    For pure functions that cost little: one that reads the global random state or a module's buffers does not belong
    here. Parameters among the ingredients get their gradients.
    """
    if not is_worth_it(ingredients[0]):
        with exact_dtypes(ingredients[0].device.type):  # as for large ones
            return make(*ingredients)
    return _Recomputed.apply(make, *ingredients)


def computing_dtype(x: Tensor) -> torch.dtype:
    """In which a product of `x` is computed here: autocast's, where that is on."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def widened(x: Tensor) -> Tensor:
    """`x` in float32 at least: what norms and rotations compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
