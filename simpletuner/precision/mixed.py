"""What `mixed_precision` means: the number format of products, and of the frozen weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

# Torch makes these attributes at run time, which type checkers do not see.
_deterministic: Any = torch.utils.deterministic
_cudnn: Any = torch.backends.cudnn

DTYPES: Mapping[str, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, mixed_precision: str) -> AbstractContextManager[Any]:
    """Products in `mixed_precision`; a no-op where it is `no`."""
    if mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[mixed_precision])


def forget_casts() -> None:
    """Call it wherever weights that train get other values in place.

    Autocast keeps the 16-bit copies of float32 weights until its outermost context ends, and does not see that a weight
    was written: it would go on computing with the old values.
    """
    torch.clear_autocast_cache()


@contextmanager
def deterministic_kernels(is_on: bool) -> Iterator[None]:
    """Inside, torch takes only kernels that give the same bits each time, and refuses what has none.

    Backward passes of attention and convolutions otherwise add up in the order in which parts of the GPU finish. cuBLAS
    reads its variable when it is first used in a process. Uninitialized memory is not filled: that is for finding
    faults, and nothing here reads any.
    """
    if not is_on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), _deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    _deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        _deterministic.fill_uninitialized_memory = before[1]


# Where torch computes in float32 on a GPU, and whether it rounds the inputs of products to TF32 (10 bits) there.
_FLOAT32_PLACES: tuple[Any, ...] = (torch.backends.cuda.matmul, _cudnn.conv, _cudnn.rnn)


def use_tf32(is_on: bool) -> None:
    """Say for every kind of product whether float32 may be rounded to TF32; torch alone would round convolutions."""
    for place in _FLOAT32_PLACES:
        place.fp32_precision = "tf32" if is_on else "ieee"


@contextmanager
def exact_float32() -> Iterator[None]:
    """Inside, products in float32 are products in float32, also on a GPU."""
    before = [place.fp32_precision for place in _FLOAT32_PLACES]
    use_tf32(False)
    try:
        yield
    finally:
        for place, value in zip(_FLOAT32_PLACES, before, strict=True):
            place.fp32_precision = value
