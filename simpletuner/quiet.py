"""Keeps remarks that libraries make about themselves while they are imported off the terminal.

diffusers imports every quantization library that is installed, whether a run uses it or not, and lycoris and peft do
the same: there is no switch to load them later. Each then says which of its optional kernels this machine lacks. Those
kernels are not used here, and what a run does use is checked by name at its start.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

# Logger -> how its needless lines begin. Whatever else these libraries say is still shown.
NEEDLESS: Mapping[str, tuple[str, ...]] = {
    # Where it is installed, accelerate imports it; the run says itself on which device it works.
    "DeepSpeed": ("Setting accelerator to CPU",),
    # Compiled kernels for GPUs of another generation, or for another build of torch.
    "torchao": ("Failed to load",),
    # Enums that torchao registers in a way that torch has grown out of.
    "torch.utils._pytree": ("<enum '",),
    # A matrix product for CPUs that would be fetched from the hub; without it the ordinary one serves.
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward",),
    # Classes of an older torchao, for checkpoints that were pickled with it; no pickle is read here.
    "diffusers.quantizers.torchao.torchao_quantizer": ("Unable to import `torchao` Tensor objects",),
}


def hide_needless_lines() -> None:
    """Drop the lines of `NEEDLESS`; called before anything heavy is imported."""
    for name, beginnings in NEEDLESS.items():
        logging.getLogger(name).addFilter(_Without(beginnings))
    # Where the weights are in main memory, so is the state.
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    # diffusers' own transformer of Chroma imports it from where it was.
    warnings.filterwarnings("ignore", message="`FluxPosEmbed` is deprecated")
    warnings.filterwarnings("ignore", message="`torch.jit.script_method` is deprecated")


@dataclass(frozen=True)  # equal filters are added once
class _Without(logging.Filter):
    beginnings: tuple[str, ...]

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)
