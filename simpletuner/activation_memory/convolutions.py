"""A frozen convolution that does not keep its input: the gradient to it depends on the weight alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from simpletuner.activation_memory.recompute import computing_dtype, is_worth_it


def frozen_conv2d(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """What `layer`, whose weight does not train and which pads with zeros, makes of `x`, (B, C, h, w)."""
    if not is_worth_it(x) or (layer.bias is not None and layer.bias.requires_grad) or isinstance(layer.padding, str):
        return layer._conv_forward(x, layer.weight, layer.bias)
    dtype = computing_dtype(x)
    return _FrozenConv2d.apply(x.to(dtype), layer, layer.weight, layer.bias)


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.layer, ctx.shape = layer, x.shape
        is_channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        ctx.layout = torch.channels_last if is_channels_last else torch.contiguous_format
        return layer._conv_forward(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        layer = ctx.layer
        # Its values are not read, but the gradient gets its layout: of another than the input's, each product with it
        # is several times slower. One value for all is enough on a GPU; on the CPU it would be copied to its full size.
        x = gradient.new_empty(1).expand(ctx.shape)
        if ctx.layout is torch.channels_last or gradient.device.type == "cpu":
            x = torch.empty_like(x, memory_format=ctx.layout)
        to_x, _, _ = torch.ops.aten.convolution_backward(
            gradient,
            x,
            weight.to(gradient.dtype),
            None,
            layer.stride,
            layer.padding,
            layer.dilation,
            False,
            [0, 0],
            layer.groups,
            (True, False, False),
        )
        return to_x, None, None, None
