"""An adapter put into the weights of a denoiser, which is then a model of its own."""

from __future__ import annotations

import torch
from torch import nn

from simpletuner.adapters.effect import weight_change
from simpletuner.adapters.weights import AdapterWeights


@torch.no_grad()
def merge_into(
    denoiser: nn.Module, weights: AdapterWeights, strength: float = 1.0, device: torch.device | None = None
) -> None:
    """Add what the adapter does to the denoiser's weights, computed in float32 and rounded once.

    Args:
        device: where it is computed, layer by layer; None is where the denoiser is.

    Raises:
        DataError: a layer's weights are packed.
    """
    layers = dict(denoiser.named_modules())
    for path, module in weights.modules.items():
        layer = layers[path]
        change, bias_change = weight_change(layer, module, strength * weights.multiplier, device)
        layer.weight.copy_(layer.weight.float() + change.to(layer.weight.device))
        if bias_change is not None:
            layer.bias.copy_(layer.bias.float() + bias_change.to(layer.bias.device))
