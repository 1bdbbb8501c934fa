"""How a matrix is packed into few bits, and read again.

The libraries choose scales and round; what they return is kept as plain tensors, so that a packed layer moves, counts
and swaps like any other. Their own layers are not used: some build CUDA or C++ kernels at the first step, some have no
gradient, most keep their inputs for a backward pass that does not need them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

Sharded = Mapping[str, Tensor]


class WeightFormat(ABC):
    """One way to store a matrix.

    Attributes:
        quantizes_activations: whether its name asks for products in 8 bits.
    """

    quantizes_activations = False

    @abstractmethod
    def fits(self, rows: int, columns: int) -> bool:
        """Whether a matrix of this shape can be packed; one that cannot stays as it is."""

    @abstractmethod
    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        """(rows, columns) floating point, on any device -> plain tensors there."""

    @abstractmethod
    def unpack(self, parts: Sharded, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The matrix that the parts stand for, in `dtype`."""

    @abstractmethod
    def num_bytes(self, rows: int, columns: int, item_size: int) -> int:
        """Bytes of the parts; `item_size` is that of a number of the dtype that was packed."""


class RowScaled(WeightFormat):
    """One byte per weight and one scale per row.

    Args:
        scale_size: bytes of a scale; None: as the weights.
    """

    def __init__(self, scale_size: int | None = None):
        self.scale_size = scale_size

    def fits(self, rows: int, columns: int) -> bool:
        return True

    def pack(self, weight: Tensor) -> dict[str, Tensor]:
        data, scale = self.pack_rows(weight)
        # A row of zeros, or one too small for the format of its scale, has a scale of 0; what a library makes of 0 / 0
        # is NaN in float8, and then every prediction is. All its bits 0 are the number 0 in each format.
        bits = data.view(torch.uint8).masked_fill(scale == 0, 0)
        return {"data": bits.view(data.dtype), "scale": scale}

    @abstractmethod
    def pack_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """(rows, columns) -> one byte per weight (rows, columns), and scales (rows, 1)."""

    def unpack(self, parts: Sharded, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        data, scale = parts["data"], parts["scale"].to(dtype)
        if data.dtype.is_floating_point:  # torch promotes no float8
            data = data.to(dtype)
        return data * scale

    def num_bytes(self, rows: int, columns: int, item_size: int) -> int:
        return rows * columns + rows * (self.scale_size or item_size)


def group_size(columns: int, largest: int = 128) -> int:
    """Columns that share a scale: the largest multiple of 32 up to `largest` that divides a row, else the whole row."""
    sizes = (size for size in range(largest, 0, -32) if columns % size == 0)
    return next(sizes, columns)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """(n, m) uint8 below 2**bits -> (n, m * bits / 8) uint8; `m * bits` is a multiple of 8."""
    per_byte = 8 // bits
    columns = values.unflatten(-1, (-1, per_byte))
    packed = torch.zeros_like(columns[..., 0])
    for index in range(per_byte):
        packed |= columns[..., index] << (bits * index)
    return packed


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_bits`."""
    mask = (1 << bits) - 1
    return torch.stack([(packed >> (bits * index)) & mask for index in range(8 // bits)], dim=-1).flatten(-2)


class GroupScaled(WeightFormat):
    """4 or 2 bits per weight; each group of columns has a scale and an offset: `data * scale - offset`."""

    def __init__(self, bits: int):
        self.bits = bits

    def fits(self, rows: int, columns: int) -> bool:
        return columns % (8 // self.bits) == 0

    def unpack(self, parts: Sharded, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        scale, offset = parts["scale"].to(dtype), parts["offset"].to(dtype)
        data = unpack_bits(parts["data"], self.bits).view(*scale.shape[:2], -1)  # (rows, groups, columns of a group)
        return torch.addcmul(-offset, data, scale).view(shape)

    def num_bytes(self, rows: int, columns: int, item_size: int) -> int:
        groups = columns // group_size(columns)
        return rows * columns * self.bits // 8 + 2 * item_size * rows * groups
