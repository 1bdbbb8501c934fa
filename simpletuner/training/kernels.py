"""Which kernels compute: torch.compile for the repeated blocks, and the preferred attention kernel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from simpletuner.errors import ConfigError, MissingDependency, Problem
from simpletuner.hardware import missing_compiler
from simpletuner.training.swapping import repeated_blocks

# Value of `attention_mechanism` -> kernel that is tried first. The others follow, for what it cannot do: a mask, or a
# head of another size.
PREFERRED: Mapping[str, SDPBackend] = {
    "native-flash": SDPBackend.FLASH_ATTENTION,
    "native-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "native-math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
OTHERS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def compile_blocks(denoiser: nn.Module, block_classes: Sequence[str], backend: str) -> None:
    """Let torch.compile make kernels for the repeated blocks: one compilation serves all of a kind.

    Args:
        backend: `dynamo_backend`; `no` leaves them.

    Raises:
        MissingDependency: there is nothing to make kernels with.
    """
    if backend == "no":
        return
    what = missing_compiler(next(denoiser.parameters()).device.type) if backend == "inductor" else None
    if what is not None:
        message = f"inductor needs {what} to make kernels"
        raise MissingDependency(Problem(message, key="dynamo_backend", fix=f"install {what}, or set it to no"))
    for block in repeated_blocks(denoiser, block_classes):
        block.compile(backend=backend)


@contextmanager
def attention_kernel(mechanism: str, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Inside the context torch's attention prefers this kernel.

    Raises:
        ConfigError: the device has none of that kind.
    """
    if mechanism not in PREFERRED:
        yield
        return
    _require_kernel(mechanism, device, dtype)
    wanted = PREFERRED[mechanism]
    order = [wanted] if wanted == SDPBackend.MATH else [wanted, *(kernel for kernel in OTHERS if kernel != wanted)]
    with sdpa_kernel(order, set_priority=True):
        yield


def _require_kernel(mechanism: str, device: torch.device, dtype: torch.dtype) -> None:
    query = torch.zeros(1, 2, 16, 64, device=device, dtype=dtype)
    try:
        with sdpa_kernel(PREFERRED[mechanism]):
            F.scaled_dot_product_attention(query, query, query)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        message = f"{device} has no such kernel for {str(dtype).removeprefix('torch.')}: {reason}"
        fix = "use diffusers, which lets torch choose"
        raise ConfigError(Problem(message, key="attention_mechanism", fix=fix)) from error
