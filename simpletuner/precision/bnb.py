"""The 4-bit NormalFloat of bitsandbytes (arXiv 2305.14314, section 3); its scales stay float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from simpletuner.precision.formats import Sharded, WeightFormat

BLOCK = 64


class NormalFloat4(WeightFormat):
    """4 bits that mean quantiles of a normal distribution, a float32 scale for every 64 weights."""

    def fits(self, rows: int, columns: int) -> bool:
        return rows * columns % BLOCK == 0

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        from bitsandbytes.functional import quantize_4bit

        data, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
        return {"data": data, "scale": state.absmax, "code": state.code}

    def unpack(self, parts: Sharded, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import QuantState, dequantize_4bit

        state = QuantState(
            parts["scale"], shape=shape, code=parts["code"], blocksize=BLOCK, quant_type="nf4", dtype=dtype
        )
        return dequantize_4bit(parts["data"], state)

    def num_bytes(self, rows: int, columns: int, item_size: int) -> int:
        return rows * columns // 2 + 4 * rows * columns // BLOCK + 4 * 16


FORMATS: Mapping[str, Callable[[], WeightFormat]] = {"nf4": NormalFloat4}
