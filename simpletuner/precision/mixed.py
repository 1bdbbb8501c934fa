"""What `mixed_precision` means: the number format of products, and of the frozen weights."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

DTYPES: Mapping[str, torch.dtype] = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, mixed_precision: str) -> AbstractContextManager[Any]:
    """Products in `mixed_precision`; a no-op where it is `no`."""
    if mixed_precision == "no":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[mixed_precision])
