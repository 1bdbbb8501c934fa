"""Which kernels compute: torch.compile for the repeated blocks, and the preferred attention kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from simpletuner.config.options import TrainConfig
from simpletuner.errors import ConfigError, MissingDependency, Problem
from simpletuner.hardware import missing_compiler
from simpletuner.precision.mixed import DTYPES, deterministic_kernels
from simpletuner.training.swapping import repeated_blocks

# Value of `attention_mechanism` -> kernel that is tried first. The others follow, for what it cannot do: a mask, or a
# head of another size.
PREFERRED: Mapping[str, SDPBackend] = {
    "native-flash": SDPBackend.FLASH_ATTENTION,
    "native-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "native-math": SDPBackend.MATH,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
# Of each kind of block: sizes become one variant when there are two; batch 1, masks and gradients double them.
VARIANTS = 64
OTHERS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)


def require_compiler(backend: str, device: torch.device) -> None:
    """Raise before anything is loaded where `dynamo_backend` could not make kernels.

    Raises:
        MissingDependency: names what is missing.
    """
    what = missing_compiler(device.type) if backend == "inductor" else None
    if what is not None:
        message = f"inductor needs {what} to make kernels"
        raise MissingDependency(Problem(message, key="dynamo_backend", fix=f"install {what}, or set it to no"))


def compile_blocks(denoiser: nn.Module, block_classes: Sequence[str], backend: str, sizes_vary: bool = False) -> None:
    """Let torch.compile make kernels for the repeated blocks: one compilation serves all of a kind.

    Args:
        backend: `dynamo_backend`; `no` leaves them.
        sizes_vary: whether images of several sizes will come: kernels then serve any number of tokens from the start.
            For a single size they are made for that size alone, which is faster; a second size compiles them again.

    Raises:
        MissingDependency: there is nothing to make kernels with.
    """
    if backend == "no":
        return
    require_compiler(backend, next(denoiser.parameters()).device)
    # A kind of block is compiled again for whatever it is called with: batch size 1, with a mask, without gradients.
    # Beyond its usual limit of 8, dynamo would say so in a log and compute without the compiler.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    if sizes_vary:  # otherwise the kernels of a square image would take its height for the width of all others
        symbolic_config.use_duck_shape = False
        _forget_graphs_of_earlier_runs()
    blocks = repeated_blocks(denoiser, block_classes)
    for block in blocks:
        block.compile(backend=backend, dynamic=sizes_vary or None)
        if block is blocks[0] and block._compiled_call_impl is not None:
            block._compiled_call_impl = _with_gradients(block._compiled_call_impl)


def _forget_graphs_of_earlier_runs() -> None:
    """Let torch compile graphs anew: those that it keeps on the disk do not know of `use_duck_shape`. A run whose first
    image had another size than that of the run before would end at once ("expected size ..., stride ...").
    """
    import torch._functorch.config
    import torch._inductor.config

    torch._inductor.config.fx_graph_cache = False
    torch._functorch.config.enable_autograd_cache = False


def _with_gradients(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Let a first block's inputs ask for gradients, as those of all others do: otherwise each variant is made twice."""

    def asking(value: Any) -> Any:
        is_plain = isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad
        return value.detach().requires_grad_() if is_plain and value.ndim > 2 else value

    def call(*inputs: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return compiled(*inputs, **options)
        return compiled(*map(asking, inputs), **{name: asking(value) for name, value in options.items()})

    return call


@contextmanager
def chosen_kernels(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Inside the context torch computes as `deterministic` and `attention_mechanism` say: training, images, timings.

    Raises:
        ConfigError: the device has no such kernel.
    """
    products = DTYPES[config.precision.mixed_precision]
    with (
        deterministic_kernels(config.precision.deterministic),
        attention_kernel(config.model.attention_mechanism, device, products),
    ):
        yield


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
    others = [] if wanted == SDPBackend.MATH else [kernel for kernel in OTHERS if kernel != wanted]
    with sdpa_kernel([wanted, *others], set_priority=True):
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
