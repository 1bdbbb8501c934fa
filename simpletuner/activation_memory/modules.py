"""The public modules that every family is made of, computing so that they keep little; parameters and keys stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from simpletuner.activation_memory.gates import gelu, gelu_gated
from simpletuner.activation_memory.norms import rms_norm

if TYPE_CHECKING:
    from diffusers.models.activations import GEGLU, GELU


def reduce_activation_memory(model: nn.Module) -> nn.Module:
    """Let the known modules in a model keep little between forward and backward pass; returns the model.

    Subclasses stay as they are, for they may compute something else.
    """
    forwards = _forwards()
    for module in model.modules():
        if type(module) in forwards:
            module.forward = MethodType(forwards[type(module)], module)
    return model


def _forwards() -> Mapping[type[nn.Module], Callable[..., Tensor]]:
    from diffusers.models.activations import GEGLU, GELU
    from diffusers.models.normalization import RMSNorm

    return {nn.RMSNorm: _rms_norm, RMSNorm: _rms_norm, GELU: _gelu, GEGLU: _geglu}


def _rms_norm(self: nn.RMSNorm, x: Tensor) -> Tensor:
    """Leaves to the module's own forward what differs: other number formats, a bias, several axes."""
    weight = self.weight
    is_plain = weight is None or (weight.dtype == x.dtype and weight.dim() == 1)
    if torch.compiler.is_compiling() or not is_plain or getattr(self, "bias", None) is not None:
        return type(self).forward(self, x)
    # torch's RMSNorm means by None the smallest step of the number format it computes in.
    eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
    return rms_norm(x, weight, eps)


def _gelu(self: GELU, hidden_states: Tensor) -> Tensor:
    return gelu(self.proj(hidden_states), self.approximate)


def _geglu(self: GEGLU, hidden_states: Tensor) -> Tensor:
    return gelu_gated(self.proj(hidden_states))
