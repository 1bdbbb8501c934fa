"""What a device can fail by in a correct run, reported with the fix: too little memory, no deterministic kernel.

Memory that does not suffice is recognized whoever says so, and answered by what helps in this configuration.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from simpletuner.config.options import TrainConfig
from simpletuner.errors import ConfigError, Problem
from simpletuner.models.devices import swaps_blocks

# How libraries say it without an exception of their own: torch on a CPU and on Apple GPUs, cuBLAS, cuDNN, CUDA.
_SIGNS = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_shortage(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def explain(error: BaseException, config: TrainConfig, device: torch.device, what: str) -> ConfigError | None:
    """The error as one that a user can fix; None where it is another one.

    Args:
        what: was being done.
    """
    if is_shortage(error):
        return shortage_error(error, config, device, what)
    if (
        config.precision.deterministic
        and isinstance(error, RuntimeError)
        and "deterministic implementation" in str(error)
    ):
        message = f"{device} has no deterministic kernel for something in this run: {str(error).splitlines()[0]}"
        fix = "remove deterministic: a resumed run is then equal but for the last bits"
        return ConfigError(Problem(message, key="deterministic", allowed="false", fix=fix))
    return None


def shortage_error(error: BaseException, config: TrainConfig, device: torch.device, what: str) -> ConfigError:
    """The error that names what helps, what costs least first.

    Args:
        what: was being done.
    """
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    ways = list(remedies(config))
    key, first = ways[0]
    others = "; ".join(text for _, text in ways[1:])
    fix = f"{first}. If that is not enough: {others}" if others else first
    message = f"not enough memory on {device} while {what}: {reason}"
    return ConfigError(Problem(message, key=key, fix=fix + ". `simpletuner plan` says what each setting takes"))


def remedies(config: TrainConfig) -> Iterator[tuple[str, str]]:
    """(key, what to do) of all that would take less memory and is not done yet, in the order of what it costs."""
    is_adapter = config.model.model_type != "full"
    if not config.model.gradient_checkpointing:
        yield "gradient_checkpointing", "set gradient_checkpointing to true"
    elif config.model.gradient_checkpointing_interval not in (None, "1"):
        yield "gradient_checkpointing_interval", "remove gradient_checkpointing_interval"
    if is_adapter and config.precision.base_model_precision == "no_change":
        yield "base_model_precision", "set base_model_precision to int8-quanto"
    if (size := config.training.train_batch_size) > 1:
        parts = next(count for count in range(2, size + 1) if size % count == 0)  # halves where it is even
        yield (
            "train_batch_size",
            f"set train_batch_size to {size // parts} and gradient_accumulation_steps to "
            f"{parts * config.training.gradient_accumulation_steps}, which trains the same",
        )
    if config.model.gradient_checkpointing_backend == "torch":
        yield "gradient_checkpointing_backend", "set gradient_checkpointing_backend to unsloth"
    is_spread = config.processes.fsdp_enable or config.processes.deepspeed_config
    if is_adapter and not swaps_blocks(config.model) and not is_spread:
        yield "enable_group_offload", "set enable_group_offload to true"
    if not is_adapter and not is_spread:
        yield "optimizer", "choose an optimizer with less state (OPTIMIZERS.md), or set fsdp_enable on several GPUs"
    yield "resolution", "lower resolution"
