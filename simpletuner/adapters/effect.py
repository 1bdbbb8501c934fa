"""What an adapter does to the weights of a layer, whatever its algorithm: for merging, and for a LoRA close to it.

A plain LoRA is a product of two matrices. The others are not asked by LyCORIS' own `get_diff_weight`, which applies the
scale of LoKr and LoHa twice (4.1.3), but by the outputs of the adapted layer: those for unit vectors are the weight
of a linear or convolutional layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from simpletuner.adapters.lycoris import isolated_lycoris
from simpletuner.adapters.lycoris_modules import beside_the_base, prepare_module
from simpletuner.adapters.weights import ALPHA, DOWN, UP, Module, scale_of
from simpletuner.errors import DataError, Problem

if TYPE_CHECKING:
    from lycoris.modules.base import LycorisBaseModule

ROWS_AT_ONCE = 1024


@torch.no_grad()
def weight_change(
    layer: nn.Module, module: Module, multiplier: float = 1.0, device: torch.device | None = None
) -> tuple[Tensor, Tensor | None]:
    """What the adapter adds to a layer's weight and bias, in float32; None where the bias stays.

    Args:
        layer: linear, convolutional without groups, or a normalization; with plain weights.
        module: the adapter's tensors for it.
        device: where this is computed and the results are; None is where the layer is.

    Raises:
        DataError: the layer's weights are packed, or it is a grouped convolution.
    """
    _require_readable(layer)
    device = device or layer.weight.device  # type: ignore[assignment]
    module = {name: tensor.to(device).float() for name, tensor in module.items()}
    if "w_norm" in module:
        bias = module.get("b_norm")
        return module["w_norm"] * multiplier, None if bias is None else bias * multiplier
    if set(module) <= {DOWN, UP, ALPHA}:
        product = module[UP].flatten(1) @ module[DOWN].flatten(1)
        return (product * (scale_of(module) * multiplier)).reshape(layer.weight.shape), None  # type: ignore[arg-type]
    alone = _plain_copy(layer).to(device)
    weight, bias = _read_off(make_module(alone, module, multiplier).to(device), alone)
    if alone.bias is not None:
        bias = bias - alone.bias
    return weight.reshape(alone.weight.shape) - alone.weight, bias if bool(bias.any()) else None


def make_module(layer: nn.Module, tensors: Module, multiplier: float) -> LycorisBaseModule:
    """LyCORIS' module for one layer's tensors, in eval mode and not applied to the layer.

    Raises:
        DataError: LyCORIS knows no such module.
    """
    from lycoris.modules import get_module, make_module
    from lycoris.modules.ia3 import IA3Module

    with isolated_lycoris():
        if "on_input" in tensors:
            module = IA3Module("layer", layer, train_on_input=bool(tensors["on_input"]))
            module.weight.data = tensors["weight"].clone()
        else:
            kind, parts = get_module({f"layer.{name}": tensor for name, tensor in tensors.items()}, "layer")
            module = None if kind is None else make_module(kind, parts, "layer", layer)
    if module is None:
        raise DataError(Problem(f"LyCORIS has no module with {', '.join(sorted(tensors))}"))
    module = beside_the_base(module)
    prepare_module(module)
    module.multiplier = multiplier
    return module.eval()


def _require_readable(layer: Any) -> None:
    if type(layer.weight) not in (Tensor, nn.Parameter) or getattr(layer, "groups", 1) != 1:
        raise DataError(
            Problem(f"the weights of a {type(layer).__name__} cannot be read: they are packed, or in groups")
        )


def _plain_copy(layer: Any) -> Any:
    """The layer in float32, a convolution without stride and padding: then one output shows one place of its kernel."""
    plain = copy.deepcopy(layer).float().eval().requires_grad_(False)
    if not isinstance(plain, nn.Linear):
        dims = len(plain.kernel_size)
        plain.stride, plain.padding, plain.dilation = (1,) * dims, (0,) * dims, (1,) * dims
        plain._reversed_padding_repeated_twice = [0] * (2 * dims)
    return plain


def _read_off(function: Callable[[Tensor], Tensor], layer: Any) -> tuple[Tensor, Tensor]:
    """(out, inputs) weight and (out,) bias of a linear function, by its outputs for ones and for zeros."""
    shape = layer.weight.shape[1:]
    nothing = function(torch.zeros(1, *shape, device=layer.weight.device)).reshape(-1)
    outputs = [function(ones).flatten(1) for ones in _single_ones(shape, layer.weight.device)]
    return (torch.cat(outputs) - nothing).T, nothing


def _single_ones(shape: torch.Size, device: torch.device) -> Iterator[Tensor]:
    count = shape.numel()
    for first in range(0, count, ROWS_AT_ONCE):
        rows = min(ROWS_AT_ONCE, count - first)
        ones = torch.zeros(rows, count, device=device)
        ones[torch.arange(rows), torch.arange(first, first + rows)] = 1
        yield ones.reshape(rows, *shape)
