"""The gate of an MLP whose gate and values are one projection.

Shazeer, "GLU Variants Improve Transformer" (arXiv 2002.05202).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from simpletuner.activation_memory.recompute import dispatched, is_worth_it


@dispatched
def silu_gated(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of a projection (..., 2 * F) whose first half is the gate: (..., F)."""
    return _SiluGated.apply(gate_up) if is_worth_it(gate_up) else _silu_gated(gate_up)


def _silu_gated(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SiluGated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _silu_gated(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        result = torch.empty_like(gate_up)
        # Both halves go where they belong, so that nothing is joined afterwards.
        to_gate, to_up = result.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=to_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=to_gate)
        return result
