"""LoKr's forward and backward pass at the speed that its structure allows, keeping nothing but its input.

LyCORIS applies `kron(w1, w2)` by building it; its bypass mode does not build it, but moves the activations through
transposed copies and keeps what lies between the factors. Here the two factors are two matrix products: `w2` within
each block of features, `w1` across the blocks, in the order that costs less.

Source: Yeh et al., "Navigating Text-To-Image Customization" (arXiv 2309.14859), section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MethodType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simpletuner.activation_memory.recompute import computing_dtype, dispatched, exact_dtypes, is_large, is_worth_it

if TYPE_CHECKING:
    from lycoris.modules.lokr import LokrModule


class KronKernels(NamedTuple):
    """Kernels that take the place of the products here.

    Args:
        name: for the log.
        forward: (x (N, b * d), w1, w2) -> (N, a * c).
        backward: (gradient, x, w1, w2) -> gradients to x, w1, w2.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor], Tensor]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


@dispatched
def kron_linear(x: Tensor, w1: Tensor, *w2_chain: Tensor, kernels: KronKernels | None = None) -> Tensor:
    """`x @ kron(w1, w2).T` without the Kronecker product.

    Since `kron(w1, w2)[i * c + k, j * d + l] = w1[i, j] * w2[k, l]`, the input is b blocks of d features.

    Args:
        x: (..., b * d).
        w1: (a, b), in the dtype of `x`.
        w2_chain: (c, d); or the factors of a low-rank w2 in the order in which they apply: (r, d), (c, r).
        kernels: compute large products where w2 is one matrix.

    Returns:
        (..., a * c).
    """
    if len(w2_chain) > 1 or not is_large(x):
        kernels = None
    if is_worth_it(x):
        return _KronLinear.apply(x, kernels, w1, *w2_chain)
    return _kron_linear(x, w1, w2_chain) if kernels is None else _by_kernels(kernels, x, w1, w2_chain[0])


def lokr_delta(module: LokrModule, x: Tensor, scale: float = 1.0) -> Tensor:
    """What a LoKr module on a linear layer adds to that layer's output; replaces `bypass_forward_diff`."""
    x = x.to(computing_dtype(x))
    w1 = module.lokr_w1 if module.use_w1 else module.lokr_w1_a @ module.lokr_w1_b
    w2_chain = (module.lokr_w2,) if module.use_w2 else (module.lokr_w2_b, module.lokr_w2_a)
    # Scaled here, because w1 is the smallest tensor.
    scale = module.scale * scale
    if scale != 1:
        w1 = w1 * scale
    if isinstance(module.scalar, nn.Parameter):  # use_scalar
        w1 = w1 * module.scalar
    factors = [factor.to(x.dtype) for factor in (w1, *w2_chain)]
    return module.drop(kron_linear(x, *factors, kernels=module.kron_kernels))


def use_structured_forward(module: LokrModule) -> None:
    """Let a LoKr module on a linear layer compute by `lokr_delta`; keys and parameters stay as they are.

    The module's own `forward` stays in charge (module dropout, multiplier). Not for weight decomposition and not for
    rank dropout, both of which need the product itself.
    """
    module.bypass_mode = True
    module.bypass_forward_diff = MethodType(lokr_delta, module)
    module.kron_kernels = None


def is_structured(module: LokrModule) -> bool:
    """Whether `use_structured_forward` was called on a module."""
    return hasattr(module, "kron_kernels")


def _kron_linear(x: Tensor, w1: Tensor, w2_chain: Sequence[Tensor]) -> Tensor:
    blocks = _blocks(x, w1)
    widths = [blocks.shape[2], *(factor.shape[0] for factor in w2_chain)]
    narrowest = widths.index(min(widths))  # where w1 has the least to do
    for factor in w2_chain[:narrowest]:
        blocks = F.linear(blocks, factor)
    blocks = _across(w1, blocks)
    for factor in w2_chain[narrowest:]:
        blocks = F.linear(blocks, factor)
    return blocks.reshape(*x.shape[:-1], -1)


def _blocks(x: Tensor, w1: Tensor) -> Tensor:
    """(..., b * d) -> (N, b, d)."""
    return x.reshape(-1, w1.shape[1], x.shape[-1] // w1.shape[1])


def _across(w1: Tensor, blocks: Tensor) -> Tensor:
    """(N, b, d) -> (N, a, d): an expanded batch of small products.

    No transposed copy, unlike matmul, which folds w1 into the batch.
    """
    return torch.bmm(w1.expand(blocks.shape[0], *w1.shape), blocks)


def _by_kernels(kernels: KronKernels, x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    return kernels.forward(x.flatten(0, -2), w1, w2).unflatten(0, x.shape[:-1])


class _KronLinear(torch.autograd.Function):
    """Keeps its input. The backward pass begins with w1, which is far cheaper than w2."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernels: KronKernels | None, w1: Tensor, *w2_chain: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x, w1, *w2_chain)
        with exact_dtypes(x.device.type):
            if kernels is not None:
                return _by_kernels(kernels, x, w1, w2_chain[0])
            return _kron_linear(x, w1, w2_chain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels: KronKernels | None = ctx.kernels
        x, w1, *w2_chain = ctx.saved_tensors
        to_chain: Sequence[Tensor | None]
        to_w1: Tensor | None
        to_x: Tensor | None
        needs_x, _, needs_w1, *needs_w2 = ctx.needs_input_grad
        with exact_dtypes(gradient.device.type):
            if kernels is not None:
                rows, inputs = gradient.flatten(0, -2).contiguous(), x.flatten(0, -2)
                to_x, to_w1, *to_chain = kernels.backward(rows, inputs, w1, w2_chain[0])
                return to_x.reshape(x.shape), None, to_w1, *to_chain
            blocks = _blocks(x, w1)
            outer = gradient.reshape(-1, w2_chain[-1].shape[0])  # (N * a, c)
            to_chain, inner = _chain_gradients(outer, w1, w2_chain, blocks if any(needs_w2) else None)
            inner = inner.view(-1, w1.shape[0], blocks.shape[2])  # (N, a, d)
            to_w1 = torch.bmm(inner, blocks.mT).sum(0) if needs_w1 else None
            to_x = _across(w1.mT, inner).reshape(x.shape) if needs_x else None
        return to_x, None, to_w1, *to_chain


def _chain_gradients(
    outer: Tensor, w1: Tensor, w2_chain: Sequence[Tensor], blocks: Tensor | None
) -> tuple[list[Tensor | None], Tensor]:
    """Gradients of the factors of w2, and to what they were multiplied with, `w1 @ blocks`.

    Args:
        outer: (N * a, c) gradient to the output.
        blocks: (N, b, d) input; None: the factors need no gradient.
    """
    if blocks is None:
        for factor in reversed(w2_chain):
            outer = outer @ factor
        return [None] * len(w2_chain), outer
    inputs = [_across(w1, blocks).flatten(0, 1)]  # (N * a, d)
    for factor in w2_chain[:-1]:
        inputs.append(F.linear(inputs[-1], factor))
    gradients: list[Tensor | None] = []
    for factor in reversed(w2_chain):
        gradients.insert(0, outer.mT @ inputs.pop())
        outer = outer @ factor
    return gradients, outer
