"""Layers of a text encoder that wait in main memory: each is on the device only while it computes.

For encoders that do not fit a card which trains well with cached captions. What is in no layer (embeddings, final norm,
head) stays on the device. A forward pass moves every layer once, so it is slower; the states are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def repeated_layers(encoder: nn.Module) -> list[nn.Module]:
    """The items of all lists of modules that are in no other list: `layers`, T5's `block`, a tower's `blocks`."""
    found: list[nn.Module] = []
    for child in encoder.children():
        found += list(child) if isinstance(child, nn.ModuleList) else repeated_layers(child)
    return found


def offload_layers(encoder: nn.Module, device: torch.device) -> None:
    """Move a frozen encoder to `device`, but for its repeated layers, which go there and back in each forward pass."""
    layers = repeated_layers(encoder)
    waiting = {id(tensor) for layer in layers for tensor in _tensors(layer)}
    for tensor in _tensors(encoder):
        if id(tensor) not in waiting:
            tensor.data = tensor.data.to(device)
    for layer in layers:
        _offload(layer, device)


def _offload(layer: nn.Module, device: torch.device) -> None:
    kept: list[tuple[Tensor, Tensor]] = []  # of each tensor its weights in main memory, while it has a copy

    def fetch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        for tensor in _tensors(module):
            kept.append((tensor, tensor.data))
            tensor.data = tensor.data.to(device, copy=True)

    def release(*_: Any) -> None:
        while kept:
            tensor, weights = kept.pop()
            tensor.data = weights

    layer.register_forward_pre_hook(fetch)
    # Also where a pass ends inside of a layer: states of the layers behind are not asked for.
    layer.register_forward_hook(release, always_call=True)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
