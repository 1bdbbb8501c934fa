"""DoRA of linear layers that keeps one tensor of the output's width, with dropout two, where PEFT's form keeps several.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv 2402.09353). The lengths of rows get no gradient
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
    """Called by PEFT's linear layer with what its base answered."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        base, dropout = module.get_base_layer(), module.lora_dropout[active_adapter]
        drops = module.training and not isinstance(dropout, nn.Identity)
        put_in = dropout(x) if drops else x
        change = module.lora_B[active_adapter](module.lora_A[active_adapter](put_in)) * module.scaling[active_adapter]
        answer = result + change
        lengthening = (_row_scale(module, active_adapter) - 1).to(answer.dtype)
        bias = () if base.bias is None else (base.bias.to(answer.dtype),)
        if not drops:
            return recomputed(_lengthened, answer, lengthening, *bias)
        # What is lengthened is made of what dropout leaves, the base's part too.
        return torch.addcmul(answer, _without_bias(base(put_in), *bias) + change, lengthening)


def use_own_dora(layer: LoraLayer) -> None:
    """Let a linear layer with PEFT's DoRA compute by `DoraLinear`; parameters stay."""
    for name, variant in layer.lora_variant.items():
        if type(variant) is DoraLinearVariant:
            layer.lora_variant[name] = DoraLinear()


def _row_scale(module: Any, adapter: str) -> Tensor:
    """Trained length over length of each row of the adapted weight, (out,)."""
    down, up, trained = (getattr(module, name)[adapter] for name in ("lora_A", "lora_B", "lora_magnitude_vector"))
    with torch.no_grad(), exact_dtypes(trained.weight.device.type):
        weight = module.get_base_layer().weight.to(up.weight.dtype)
        change = up.weight @ down.weight
        length = trained.get_weight_norm(weight, change, module.scaling[adapter], adapter_name=adapter)
    return trained.weight / length


def _lengthened(x: Tensor, lengthening: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows that are `1 + lengthening` times as long, and the same bias: exactly `x` where an adapter begins."""
    return torch.addcmul(x, _without_bias(x, bias), lengthening)


def _without_bias(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return x if bias is None else x - bias
