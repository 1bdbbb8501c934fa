"""Formats of optimum-quanto: its scales, its rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from simpletuner.precision.formats import GroupScaled, RowScaled, WeightFormat, group_size, pack_bits


class QuantoBytes(RowScaled):
    """int8 or float8, symmetric, a scale per row from the largest weight."""

    def __init__(self, qtype: str):
        super().__init__()
        self.qtype = qtype

    def pack_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        from optimum.quanto import AbsmaxOptimizer, qtypes
        from optimum.quanto.tensor import quantize_weight

        qtype = qtypes[self.qtype]
        scale = AbsmaxOptimizer()(weight, qtype=qtype, axis=0)
        packed = quantize_weight(weight, qtype=qtype, axis=0, scale=scale, optimized=False)
        return packed._data, packed._scale


class QuantoBits(GroupScaled):
    """int4 or int2, asymmetric, a scale and an offset per group of up to 128 columns."""

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        from optimum.quanto import MaxOptimizer, qtypes

        rows, columns = weight.shape
        size = group_size(columns)
        qtype = qtypes[f"qint{self.bits}"]
        scale, offset = MaxOptimizer()(weight, qtype=qtype, axis=0, group_size=size)
        # quanto's own rounding, which packs rows behind each other and unpacks by a kernel that it builds at first use.
        data = torch.round((weight.reshape(-1, size) + offset) / scale).clamp(0, 2**self.bits - 1).to(torch.uint8)
        shape = (rows, columns // size, 1)
        return {
            "data": pack_bits(data.view(rows, columns), self.bits),
            "scale": scale.reshape(shape),
            "offset": offset.reshape(shape),
        }


FORMATS: Mapping[str, Callable[[], WeightFormat]] = {
    "int8": lambda: QuantoBytes("qint8"),
    "fp8": lambda: QuantoBytes("qfloat8_e4m3fn"),
    "fp8uz": lambda: QuantoBytes("qfloat8_e4m3fnuz"),
    "int4": lambda: QuantoBits(4),
    "int2": lambda: QuantoBits(2),
}
