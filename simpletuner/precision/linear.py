"""A frozen linear layer whose weight is packed: it computes with the weight unpacked for the moment of the product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.precision.formats import Sharded, WeightFormat


class QuantisedLinear(nn.Linear):
    """`nn.Linear` with a packed weight that does not train.

    The backward pass unpacks again, so that nothing but the packed weight is kept; the gradient to the input is that of
    the product that was computed. `weight` gives the unpacked matrix: what needs the matrix itself (weight
    decomposition, rotations) works, only slower.

    Args:
        layer: on the device where it is to be packed; its bias is taken over.
        weight_format: how.
        path: of the layer in its model; an adapter may move it to another one.
    """

    def __init__(self, layer: nn.Linear, weight_format: WeightFormat, path: str = ""):
        nn.Module.__init__(self)
        self.path = path
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight_format = weight_format
        self.dtype = layer.weight.dtype
        with torch.no_grad():
            parts = weight_format.pack(layer.weight.detach())
        self.part_names = tuple(parts)
        for name, part in parts.items():
            self.register_buffer(f"packed_{name}", part.contiguous())
        self.register_parameter("bias", layer.bias)
        self.requires_grad_(False)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The packed weight, by the names of its format."""
        return {name: getattr(self, f"packed_{name}") for name in self.part_names}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """(out_features, in_features): unpacked again at each call."""
        return self.unpacked(self.dtype)

    def unpacked(self, dtype: torch.dtype, parts: Sharded | None = None) -> Tensor:
        """The matrix in `dtype`; of other parts than its own, where they were copied to another device."""
        shape = torch.Size((self.out_features, self.in_features))
        with torch.no_grad():
            return self.weight_format.unpack(self.parts if parts is None else parts, shape, dtype)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        return _UnpackedProduct.apply(input, self, *self.parts.values())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={type(self.weight_format).__name__}"


class _UnpackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantisedLinear, *parts: Tensor) -> Tensor:
        # Saved, and not taken from the layer again: a block that is swapped out holds other copies by then.
        ctx.save_for_backward(*parts)
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        return F.linear(input, _matrix(layer, parts, input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.saved_tensors  # may be asked for once only
        return grad_output @ _matrix(ctx.layer, parts, grad_output.dtype), None, *(None for _ in parts)


def _matrix(layer: QuantisedLinear, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return layer.unpacked(dtype, dict(zip(layer.part_names, parts, strict=True)))
