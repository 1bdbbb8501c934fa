"""A frozen linear layer whose weight is packed.

It computes with the weight unpacked for the moment of the product, or quantizes its input too and multiplies in 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from simpletuner.precision.formats import RowScaled, Sharded, WeightFormat
from simpletuner.precision.products import (
    UNPACKED,
    Ways,
    has_8_bit_products,
    input_gradient,
    output_product,
    ways_of,
)


class QuantizedLinear(nn.Linear):
    """`nn.Linear` with a packed weight that does not train.

    The backward pass unpacks again, so that nothing but the packed weight is kept; the gradient to the input is that of
    the product that was computed. `weight` gives the unpacked matrix: what needs the matrix itself (weight
    decomposition, rotations) works, only slower.

    Args:
        layer: on the device where it is to be packed; its bias is taken over.
        weight_format: how.
        path: of the layer in its model; an adapter may move it to another one.
        quantizes_activations: products in 8 bits, where format and shape allow them.

    Attributes:
        is_in_8_bits: whether products in 8 bits were asked for, and are possible.
        ways: how output and gradient are computed now.
    """

    def __init__(
        self, layer: nn.Linear, weight_format: WeightFormat, path: str = "", quantizes_activations: bool = False
    ):
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
        in_8_bits = isinstance(weight_format, RowScaled) and has_8_bit_products(self.out_features, self.in_features)
        self.is_in_8_bits = in_8_bits and (quantizes_activations or weight_format.quantizes_activations)
        self.ways = ways_of(parts["data"].dtype) if self.is_in_8_bits else UNPACKED
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
        return packed_product(input, self, *self.parts.values())

    def output(self, x: Tensor, parts: Sharded, ways: Ways) -> Tensor:
        """(..., in_features) -> (..., out_features), without a graph."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if ways.output == "unpacked":
            return F.linear(x, self.unpacked(x.dtype, parts), bias)
        return output_product(x, parts["data"], parts["scale"], bias, ways.output)

    def gradient(self, gradient: Tensor, parts: Sharded, ways: Ways) -> Tensor:
        """(..., out_features) of the output -> (..., in_features) of the input."""
        if ways.gradient == "unpacked":
            return gradient @ self.unpacked(gradient.dtype, parts)
        return input_gradient(gradient, parts["data"], parts["scale"], ways.gradient)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, format={type(self.weight_format).__name__}"


@contextmanager
def exact_activations(module: nn.Module) -> Iterator[None]:
    """Inside, the packed layers of a module quantize no activations."""
    layers = [layer for layer in module.modules() if isinstance(layer, QuantizedLinear)]
    before = [layer.ways for layer in layers]
    for layer in layers:
        layer.ways = UNPACKED
    try:
        yield
    finally:
        for layer, ways in zip(layers, before, strict=True):
            layer.ways = ways


def packed_product(input: Tensor, layer: QuantizedLinear, *parts: Tensor) -> Tensor:
    """What a layer makes of its input with these parts; like torch's own product seen by `__torch_function__`."""
    if not torch.compiler.is_compiling() and has_torch_function_unary(input):
        return handle_torch_function(packed_product, (input,), input, layer, *parts)
    return _FrozenProduct.apply(input, layer, *parts)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantizedLinear, *parts: Tensor) -> Tensor:
        # Saved, and not taken from the layer again: a block that is swapped out holds other copies by then.
        ctx.save_for_backward(*parts)
        ctx.layer = layer
        return layer.output(input, _named(layer, parts), layer.ways)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        parts, layer = ctx.saved_tensors, ctx.layer  # the tensors may be asked for once only
        return layer.gradient(grad_output, _named(layer, parts), layer.ways), None, *(None for _ in parts)


def _named(layer: QuantizedLinear, parts: Sequence[Tensor]) -> Sharded:
    return dict(zip(layer.part_names, parts, strict=True))
