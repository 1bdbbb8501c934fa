"""DoRA of linear layers that keeps one tensor of the output's width, with dropout two, where PEFT's form keeps several.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353). The norms of rows get no gradient
(section 4.3 there), so nothing of the size of a weight is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn

from simpletuner.activation_memory.recompute import exact_dtypes, recomputed


class DoraLinear(DoraLinearVariant):
    """Called by PEFT's linear layer with the result of its base layer."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        base, dropout = module.get_base_layer(), module.lora_dropout[active_adapter]
        has_dropout = module.training and not isinstance(dropout, nn.Identity)
        dropped = dropout(x) if has_dropout else x
        lora = module.lora_B[active_adapter](module.lora_A[active_adapter](dropped)) * module.scaling[active_adapter]
        adapted = result + lora
        scale_less_one = (_magnitude_scale(module, active_adapter) - 1).to(adapted.dtype)
        bias = () if base.bias is None else (base.bias.to(adapted.dtype),)
        if not has_dropout:
            return recomputed(_scaled, adapted, scale_less_one, *bias)
        # What is scaled is computed from the inputs that dropout leaves, the base's part too.
        return torch.addcmul(adapted, _without_bias(base(dropped), *bias) + lora, scale_less_one)


def use_own_dora(layer: LoraLayer) -> None:
    """Let a linear layer with PEFT's DoRA compute by `DoraLinear`; parameters stay."""
    for name, variant in layer.lora_variant.items():
        if type(variant) is DoraLinearVariant:
            layer.lora_variant[name] = DoraLinear()


def _magnitude_scale(module: Any, adapter: str) -> Tensor:
    """(out,) trained magnitude over norm of each row of the adapted weight."""
    lora_a, lora_b = module.lora_A[adapter], module.lora_B[adapter]
    magnitude = module.lora_magnitude_vector[adapter]
    with torch.no_grad(), exact_dtypes(magnitude.weight.device.type):
        weight = module.get_base_layer().weight.to(lora_b.weight.dtype)
        lora_weight = lora_b.weight @ lora_a.weight
        norm = magnitude.get_weight_norm(weight, lora_weight, module.scaling[adapter], adapter_name=adapter)
    return magnitude.weight / norm


def _scaled(x: Tensor, scale_less_one: Tensor, bias: Tensor | None = None) -> Tensor:
    """All but the bias times `1 + scale_less_one`: exactly `x` for an adapter that has not been trained."""
    return torch.addcmul(x, _without_bias(x, bias), scale_less_one)


def _without_bias(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return x if bias is None else x - bias
