"""Kernels that one step of training asks of a device: the whole depth of OmniGen and FLUX.1, beside what is published.

Counted on torch's `meta` device, where nothing is computed: every operation that is dispatched and is no view, in
forward and backward pass, one image of 1024 px in bf16. Attention counts as the one kernel that it is. "lean" is this
project as it is; "plain" the same with its lean paths off, hence at the memory of the published modules.

    python benchmarks/operations.py [omnigen] [flux]

Goal: plain at most 1.00 of published. The last line is one JSON object; exit code 1 where the goal is missed.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from public_models import Side, ours, published
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpletuner.activation_memory import recompute
from simpletuner.models.omnigen import attention

META = torch.device("meta")
NO_KERNELS = {"aten::detach", "aten::empty", "aten::empty_like", "aten::new_empty", "aten::empty_strided"}
NO_KERNELS |= {"aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::new_empty_strided"}
GOAL = 1.0


class Kernels(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name
        if name == "aten::_local_scalar_dense" and args[0].is_meta:
            return 0  # a wait for the device, as OmniGen's published angles have one; here there is no value
        output = function(*args, **(kwargs or {}))
        is_on_device = any(isinstance(each, Tensor) and each.is_meta for each in tree_leaves(output))
        if is_on_device and not function.is_view and name not in NO_KERNELS:
            self.counts[name] = self.counts.get(name, 0) + 1
        return output

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def one_kernel(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
    """Attention, which on `meta` torch would take apart."""
    return _Attention.apply(query, key, value)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return query.relu()  # stands for the kernel

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        _, key, value = ctx.saved_tensors
        return gradient.relu(), torch.empty_like(key), torch.empty_like(value)


class _Norm(torch.autograd.Function):
    """torch's RMSNorm is one kernel on a GPU, and six on `meta`; its weights do not train here."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
        ctx.save_for_backward(x)
        return x.relu()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient.relu(), None, None, None


def count(side: Side) -> Kernels:
    """Of the second step: the first one does not know yet which block is the last."""
    # Published modules switch autocast off for their angles, and torch has none on `meta`.
    with (
        patch.object(nn.functional, "scaled_dot_product_attention", one_kernel),
        patch.object(attention, "scaled_dot_product_attention", one_kernel),
        patch.object(nn.functional, "rms_norm", _Norm.apply),
        patch.object(torch, "autocast", lambda *args, **options: nullcontext()),
    ):
        for _ in range(2):
            for parameter in side.parameters:
                parameter.grad = None
            with Kernels() as kernels:
                side.losses().backward()
    return kernels


def compare(family: str, adapter: str, recomputes: bool, shape: Any = None) -> dict[str, Any]:
    usual = recompute.LARGE
    lean = count(ours(family, adapter, recomputes, META, 1024, shape))
    recompute.LARGE = sys.maxsize
    try:
        plain = count(ours(family, adapter, recomputes, META, 1024, shape))
    finally:
        recompute.LARGE = usual
    theirs = count(published(family, adapter, recomputes, META, 1024, shape))
    return {
        "lean": lean.total,
        "plain": plain.total,
        "published": theirs.total,
        "plain_ratio": round(plain.total / theirs.total, 2),
        "lean_ratio": round(lean.total / theirs.total, 2),
    }


def main() -> int:
    rows = {}
    for family in sys.argv[1:] or ("omnigen", "flux"):
        for adapter in ("lora", "lokr"):
            for recomputes in (False, True):
                name = f"{family} {adapter}{' recomputed' * recomputes}"
                rows[name] = compare(family, adapter, recomputes)
                print(f"{name}: {rows[name]}", flush=True)
    print(json.dumps({"benchmark": "operations", "goal": GOAL, "torch": torch.__version__, "rows": rows}))
    return int(any(row["plain"] > GOAL * row["published"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
