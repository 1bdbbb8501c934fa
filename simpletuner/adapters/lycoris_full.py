"""LyCORIS' `full` as a difference beside the layer's weight, which stays where it is.

LyCORIS moves the weight into its module: the base is then gone, which prior preservation and saving need, and a second
copy of it stays in main memory. Imported where such a module is made, for it imports LyCORIS.
"""

from __future__ import annotations

from typing import Any

import torch
from lycoris.modules.base import LycorisBaseModule
from lycoris.modules.full import FullModule
from torch import Tensor, nn


class FullDifference(FullModule):
    """`W x + D x` with a trained D of the weight's shape; the file is LyCORIS' own (`diff`, `diff_b`)."""

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float = 1,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        use_tucker: bool = False,
        rank_dropout_scale: bool = False,
        **kwargs: Any,
    ):
        # Not FullModule's own, which copies the weight to main memory.
        LycorisBaseModule.__init__(
            self, lora_name, org_module, multiplier, dropout, rank_dropout, module_dropout, rank_dropout_scale, False
        )
        weight, bias = org_module.weight, org_module.bias
        if self.is_quant or not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
            raise ValueError("full trains whole weights, and those of the base are packed")
        self.weight = nn.Parameter(torch.zeros_like(weight))
        self.bias = nn.Parameter(torch.zeros_like(bias)) if isinstance(bias, Tensor) else None
        self.is_diff = True

    @classmethod
    def of(cls, module: FullModule) -> FullDifference:
        """A module that LyCORIS loaded from a file, as one of this kind."""
        difference = cls(module.lora_name, module.org_module[0], module.multiplier)
        difference.weight, difference.bias = module.weight, module.bias
        return difference

    def apply_to(self, **kwargs: Any) -> None:
        LycorisBaseModule.apply_to(self, **kwargs)

    def restore(self) -> None:
        LycorisBaseModule.restore(self)

    def custom_state_dict(self) -> dict[str, Tensor]:
        return {"diff": self.weight} if self.bias is None else {"diff": self.weight, "diff_b": self.bias}

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Dropout of the whole module and of rows as LyCORIS has it."""
        base = self.org_forward(x, *args, **kwargs)
        if self.module_dropout and self.training and torch.rand(1) < self.module_dropout:
            return base
        weight = self.weight.to(x.dtype) * self.multiplier
        bias = None if self.bias is None else self.bias.to(x.dtype) * self.multiplier
        if self.rank_dropout and self.training:
            kept = (torch.rand(self.dim) > self.rank_dropout).to(weight)
            kept = kept / kept.mean() if self.rank_dropout_scale else kept
            weight = weight * kept.view(-1, *[1] * (weight.dim() - 1))
            bias = None if bias is None else bias * kept
        return base + self.op(x, weight, bias, **self.kw_dict)
