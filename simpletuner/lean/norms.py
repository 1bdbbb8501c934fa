"""RMSNorm that keeps its input alone, where diffusers' keeps copies in float32.

Zhang and Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467). torch's own function rounds once, at the
end, and is one kernel on a GPU; its output is made again from the input where a layer behind it asks.
"""

from __future__ import annotations

from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.lean.recipes import remade


def use_lean_norms(model: nn.Module) -> nn.Module:
    """Let every RMSNorm of torch or diffusers in a model keep little; parameters and keys stay; returns the model."""
    from diffusers.models.normalization import RMSNorm

    for module in model.modules():
        if type(module) in (RMSNorm, nn.RMSNorm):
            module.forward = MethodType(_forward, module)
    return model


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension, (..., D); statistics in float32."""
    shape = x.shape[-1:]
    if weight is None:
        return remade(lambda x: F.rms_norm(x, shape, eps=eps), x)
    return remade(lambda x, weight: F.rms_norm(x, shape, weight, eps), x, weight)


def _forward(self: nn.RMSNorm, x: Tensor) -> Tensor:
    """Takes the place of a module's own, which it leaves what differs: other number formats, a bias, several axes."""
    weight = self.weight
    is_plain = weight is None or (weight.dtype == x.dtype and weight.dim() == 1)
    if torch.compiler.is_compiling() or not is_plain or getattr(self, "bias", None) is not None:
        return type(self).forward(self, x)
    # torch's RMSNorm means by None the smallest step of the number format it computes in.
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
    return rms_norm(x, weight, eps)
