"""Linear layers that compute in the dtype of their input, whatever dtype their weights are stored in."""

from __future__ import annotations

from collections.abc import Iterable
from types import MethodType

import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.activation_memory.recompute import computing_dtype


def follow_input_dtype(modules: Iterable[nn.Module]) -> None:
    """Let those of the modules that are torch's own `nn.Linear` compute by `linear`; parameters and keys stay."""
    for module in modules:
        if type(module) is nn.Linear:
            setattr(module, "forward", MethodType(_forward, module))  # noqa: B010 - of this layer alone


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` in the dtype of `x`, or autocast's.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,).

    Returns:
        (..., out).
    """
    dtype = computing_dtype(x)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, self.weight, self.bias)
