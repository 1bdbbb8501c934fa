"""Formats of torchao: its scales, its rounding."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from simpletuner.precision.formats import GroupScaled, RowScaled, WeightFormat, group_size, pack_bits


class TorchaoInt8(RowScaled):
    """int8, symmetric, a scale per row, stored in float32."""

    def __init__(self) -> None:
        super().__init__(scale_size=4)

    def pack_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        from torchao.quantization import Int8Tensor, PerRow

        packed = Int8Tensor.from_hp(weight, PerRow())
        return packed.qdata, packed.scale.reshape(-1, 1)


class TorchaoInt8Dynamic(TorchaoInt8):
    """The same weights; activations are quantized as they come."""

    quantizes_activations = True


class TorchaoFloat8(RowScaled):
    """float8 (e4m3), a scale per row, stored in float32."""

    def __init__(self) -> None:
        super().__init__(scale_size=4)

    def pack_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        from torchao.quantization import Float8Tensor, PerRow

        packed = Float8Tensor.from_hp(weight, granularity=PerRow())
        return packed.qdata, packed.scale.reshape(-1, 1)


class TorchaoInt4(GroupScaled):
    """int4, asymmetric, a scale and an offset per group of up to 128 columns."""

    def __init__(self) -> None:
        super().__init__(bits=4)

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine

        rows, columns = weight.shape
        block = (1, group_size(columns))
        limits = {"quant_min": 0, "quant_max": 15}
        scale, zero = choose_qparams_affine(weight, MappingType.ASYMMETRIC, block, torch.uint8, **limits)
        data = quantize_affine(weight, block, scale, zero, torch.uint8, **limits)
        shape = (rows, -1, 1)
        return {
            "data": pack_bits(data, 4),
            "scale": scale.to(weight.dtype).reshape(shape),
            "offset": (zero * scale).to(weight.dtype).reshape(shape),
        }


FORMATS: Mapping[str, Callable[[], WeightFormat]] = {
    "int8": TorchaoInt8,
    "int8dq": TorchaoInt8Dynamic,
    "fp8": TorchaoFloat8,
    "fp8wo": TorchaoFloat8,
    "int4": TorchaoInt4,
}
