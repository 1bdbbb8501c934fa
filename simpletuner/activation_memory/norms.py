"""RMSNorm that keeps its input alone, where diffusers' keeps copies in float32.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467). torch's own function rounds once, at the
end, and is one kernel on a GPU. On a CPU it is eight, and their gradients twice as many: there both are computed here,
in half of the time and with the same bits forward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simpletuner.activation_memory.recompute import dispatched, exact_dtypes, is_large, recomputed, widened


@dispatched
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, (..., D); statistics in float32."""
    shape = x.shape[-1:]
    # Without gradients too: what is made again must have the same bits.
    if x.device.type == "cpu" and is_large(x) and not torch.compiler.is_compiling():
        return _RmsNorm.apply(x, weight, eps)
    if weight is None:
        return recomputed(lambda x: F.rms_norm(x, shape, None, eps), x)
    return recomputed(lambda x, weight: F.rms_norm(x, shape, weight, eps), x, weight)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        with exact_dtypes(x.device.type):
            wide = widened(x)
            scale = _scale(wide, eps)
            normed = wide * scale if wide is x else wide.mul_(scale)
            return (normed if weight is None else normed.mul_(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        narrow, weight = ctx.saved_tensors
        to_x = to_weight = None
        with exact_dtypes(gradient.device.type):
            x = widened(narrow)
            scale = _scale(x, ctx.eps)
            if ctx.needs_input_grad[0]:
                to_normed = widened(gradient if weight is None else gradient * weight.to(x.dtype))
                along = torch.linalg.vecdot(to_normed, x).unsqueeze(-1) * scale.square() / x.shape[-1]
                to_x = torch.addcmul(to_normed, x, along, value=-1).mul_(scale).to(narrow.dtype)
            if ctx.needs_input_grad[1]:
                to_weight = (gradient * x * scale).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        return to_x, to_weight, None


def _scale(x: Tensor, eps: float) -> Tensor:
    """`1 / rms(x)`, (..., 1), with the bits that torch's own function has in it."""
    return x.square().mean(dim=-1, keepdim=True).add_(eps).rsqrt_()
