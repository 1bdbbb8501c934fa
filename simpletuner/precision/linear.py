"""A frozen linear layer whose weight is packed: it computes with the weight unpacked for the moment of the product."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simpletuner.precision.formats import WeightFormat


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
        """(out_features, in_features): unpacked anew at each call."""
        return self.unpacked(self.dtype)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            return self.weight_format.unpack(self.parts, torch.Size((self.out_features, self.in_features)), dtype)

    def forward(self, input: Tensor) -> Tensor:
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            input = input.to(torch.get_autocast_dtype(kind))
        return _UnpackedProduct.apply(input, self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={type(self.weight_format).__name__}"


class _UnpackedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        return F.linear(input, layer.unpacked(input.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output @ ctx.layer.unpacked(grad_output.dtype), None
