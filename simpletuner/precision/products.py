"""Products of a frozen 8-bit weight with activations that are quantized as they come, with one scale for each token.

    output[t, o]   = row_scale[t] * weight_scale[o] * sum over k of rows[t, k] * data[o, k]
    gradient[t, k] = row_scale[t] * sum over o of rows[t, o] * data[o, k]

Integers are summed in int32, float8 in float32. The gradient to the input is a sum over the output channels, so the
weight's scales cannot stand before it: they are multiplied into the incoming gradient before that is quantized.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# How a product is computed: with the unpacked matrix in the dtype of the activations; in 8 bits with the matrix as it
# lies in memory; or in 8 bits with a copy of it that lies the other way round, for kernels that take only that.
Way = Literal["unpacked", "direct", "copied"]

MULTIPLE = 16  # of both sizes of a matrix, for the 8-bit units of GPUs
LEAST_ROWS = 32  # their integer kernels take no fewer than 17
# Rows are multiplied in parts, so that sums in 32 bits take little memory: numbers of the longer side of one part.
PART = 1 << 23
# What torch and the libraries of number formats raise where a device or a shape is none of theirs.
FAILURES = (RuntimeError, NotImplementedError, ValueError, TypeError, ImportError, AssertionError, OSError)
BYTES_PER_NUMBER = 9  # of a part: the quantized rows, their sums in 32 bits, and those with their scales


class Ways(NamedTuple):
    """How a layer computes its output, and the gradient to its input."""

    output: Way
    gradient: Way


UNPACKED = Ways("unpacked", "unpacked")


def ways_of(dtype: torch.dtype) -> Ways:
    """Those that work wherever 8-bit products of this dtype do: float8 units read the right side by columns only."""
    return Ways("direct", "direct" if dtype == torch.int8 else "copied")


def has_8_bit_products(rows: int, columns: int) -> bool:
    """Whether kernels take a matrix of this shape, and its transpose; others are always unpacked."""
    return rows % MULTIPLE == 0 and columns % MULTIPLE == 0


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(rows, columns) -> the same in `dtype`, and float32 scales (rows, 1): `x` is about their product.

    The largest number of a row becomes the largest of the format. A row that is not finite gets a scale that is not, so
    that whatever the row is multiplied with, the result shows it.
    """
    largest = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    peaks = torch.linalg.vector_norm(x, torch.inf, dim=-1, keepdim=True, dtype=torch.float32)
    scales = (peaks / largest).clamp_min(torch.finfo(torch.float32).tiny)
    rows = x / scales
    return (rows.round() if dtype == torch.int8 else rows).to(dtype), scales


def output_product(x: Tensor, data: Tensor, scale: Tensor, bias: Tensor | None, way: Way) -> Tensor:
    """`x @ weight.T + bias` in 8 bits.

    Args:
        x: (..., in), floating point.
        data: (out, in) int8 or float8.
        scale: (out, 1), of the rows of `data`.
        bias: (out,).

    Returns:
        (..., out) in the dtype of `x`.
    """
    return _in_parts(x, data.t(), way, None, scale.float().t(), bias)


def input_gradient(gradient: Tensor, data: Tensor, scale: Tensor, way: Way) -> Tensor:
    """`gradient @ weight` in 8 bits: (..., out) -> (..., in); see `output_product`."""
    return _in_parts(gradient, data, way, scale.float().t(), None, None)


def product_bytes(num_tokens: int, rows: int, columns: int) -> int:
    """The most that a product with a (rows, columns) matrix makes besides its result, a copy of the matrix included."""
    return BYTES_PER_NUMBER * min(num_tokens * max(rows, columns), PART) + rows * columns


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """(rows, k) @ (k, columns): exactly, in int32, of int8; in float32 of float8."""
    if left.dtype == torch.int8:
        return torch._int_mm(left, right)
    if left.device.type == "cpu":  # torch's own kernel takes ten thousand times as long there
        with torch.autocast("cpu", enabled=False):
            return left.float() @ right.float()
    one = left.new_ones((), dtype=torch.float32)
    return torch._scaled_mm(left, right, one, one, out_dtype=torch.float32)


def _in_parts(
    x: Tensor, matrix: Tensor, way: Way, factors: Tensor | None, column_scales: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Part by part, for what surrounds a product takes more than the product; a compiler makes one kernel of that.

    Args:
        matrix: (columns of x, columns of the result).
        factors: (1, columns of x), multiplied into `x` first.
        column_scales: (1, columns of the result).
    """
    dtype = matrix.dtype
    if way == "copied":
        matrix = matrix.t().contiguous().t() if matrix.is_contiguous() else matrix.contiguous()
    if dtype != torch.int8 and matrix.device.type == "cpu":
        matrix = matrix.float()  # once, not for each part

    def part(rows: Tensor) -> Tensor:
        quantized, row_scales = quantize_rows(rows if factors is None else rows * factors, dtype)
        missing = LEAST_ROWS - len(rows)
        if missing > 0:
            quantized = F.pad(quantized, (0, 0, 0, missing))
        product = multiply(quantized, matrix)[: len(rows)] * row_scales
        if column_scales is not None:
            product = product.mul_(column_scales)
        return product if bias is None else product.add_(bias)

    rows = x.flatten(0, -2)
    length = max(PART // max(matrix.shape), LEAST_ROWS)
    if torch.compiler.is_compiling() or len(rows) <= length:
        result = part(rows).to(x.dtype)
    else:
        result = x.new_empty(len(rows), matrix.shape[1])
        for some, place in zip(rows.split(length), result.split(length), strict=True):
            place.copy_(part(some))
    return result.unflatten(0, x.shape[:-1])
