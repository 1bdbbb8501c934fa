"""RMSNorm that keeps its input alone, where diffusers' keeps copies in float32.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467). torch's own function rounds once, at the
end, and is one kernel on a GPU. On a CPU it is six, and their gradients twice as many: there the gradient is
computed here, in a third of the time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simpletuner.activation_memory.recompute import dispatched, exact_dtypes, is_worth_it, recomputed


@dispatched
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, (..., D); statistics in float32."""
    shape = x.shape[-1:]
    if is_worth_it(x) and x.device.type == "cpu":
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
            return F.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        narrow, weight = ctx.saved_tensors
        to_x = to_weight = None
        with exact_dtypes(gradient.device.type):
            x = narrow.to(torch.promote_types(narrow.dtype, torch.float32))
            mean_square = torch.linalg.vecdot(x, x).unsqueeze(-1) / x.shape[-1] + ctx.eps
            scale = mean_square.rsqrt()
            if ctx.needs_input_grad[0]:
                to_normed = (gradient if weight is None else gradient * weight.to(x.dtype)).to(x.dtype)
                along = torch.linalg.vecdot(to_normed, x).unsqueeze(-1) / (mean_square * x.shape[-1])
                to_x = torch.addcmul(to_normed, x, along, value=-1).mul_(scale).to(narrow.dtype)
            if ctx.needs_input_grad[1]:
                to_weight = (gradient * x * scale).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        return to_x, to_weight, None
