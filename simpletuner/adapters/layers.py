"""Layers that an adapter can sit on, seen through quantization.

A quantized layer has a class of its own (`QuantizedLinear`, quanto's `QLinear`) or a packed weight inside of a plain
`Linear` (torchao). Presets and targets name the class that the layer had before, so that is what counts here.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn

ADAPTABLE_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_linear(module: nn.Module) -> bool:
    """Whether a layer is a linear one, quantized or not: every library derives its own from torch's."""
    return isinstance(module, nn.Linear)


def is_adaptable(module: nn.Module) -> bool:
    """Whether a layer is linear or convolutional, quantized or not."""
    return isinstance(module, ADAPTABLE_LAYERS)


def is_layer(module: nn.Module) -> bool:
    """Whether a module holds weights of its own, quantized or not, and is no mere container of others."""
    return is_adaptable(module) or next(module.parameters(recurse=False), None) is not None


def layer_class(module: nn.Module) -> str:
    """The class name by which a configuration calls a module: for a linear or convolutional layer torch's own.

    A subclass that the model itself defines (`LoRACompatibleConv`, `FP32LayerNorm`) keeps its name: only what comes
    from a quantization library was something else before.
    """
    cls = type(module)
    if is_adaptable(module) and cls.__module__.startswith(QUANTIZERS):
        return next(base.__name__ for base in cls.__mro__ if base in ADAPTABLE_LAYERS)
    return cls.__name__


# Packages whose layers take the place of torch's.
QUANTIZERS = ("simpletuner.precision.", "optimum.", "bitsandbytes.", "torchao.")


def floating_dtype(denoiser: nn.Module) -> torch.dtype:
    """In which a denoiser computes: of its first weights that are not packed."""
    return next(p.dtype for p in denoiser.parameters() if p.is_floating_point() and type(p) is nn.Parameter)


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer is; its weight may be packed, and unpacking it only to ask would cost."""
    return next(itertools.chain(layer.parameters(), layer.buffers())).device


def num_rows(module: nn.Module) -> int:
    """Output features of a linear layer, output channels of a convolution; also of a layer that carries an adapter."""
    rows = getattr(module, "out_features", None)
    return rows if rows is not None else module.out_channels  # type: ignore[return-value]
