"""Weights spread over the processes by torch's `fully_shard` (FSDP2).

Each process keeps its part of every block and fetches the others' when the block works. An adapter stays whole on every
process: it is small, every optimizer can move it, and its checkpoints are those of a single process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from simpletuner.distributed.process_group import ProcessGroup
from simpletuner.errors import ConfigError, Problem

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard_denoiser(
    denoiser: nn.Module,
    block_classes: tuple[str, ...],
    process_group: ProcessGroup,
    device: torch.device,
    *,
    whole: set[nn.Parameter],
    shard_size: int | None = None,
    reshards: bool = True,
    offloads: bool = False,
    computes_in: torch.dtype = torch.float32,
    mesh: DeviceMesh | None = None,
) -> None:
    """Spread a denoiser that lies in main memory; afterwards `device` holds this process's part.

    Gradients of spread parameters are summed over the processes, not averaged: the loss is divided by the weight of
    the whole global window already.

    Args:
        block_classes: of the repeated blocks; each is fetched by itself, what is left over stays fetched.
        whole: parameters that every process keeps (an adapter's).
        shard_size: processes that share one copy; None for all.
        reshards: free a block between its forward and backward pass.
        offloads: keep the parts in main memory.
        computes_in: weights travel in this number format; their gradients are summed in float32, whatever it is.
        mesh: from `make_mesh`, where the processes of a machine load one after the other: with it no process waits for
            another here, and a block's memory is free again as soon as its part is cut out.

    Raises:
        ConfigError: the processes cannot be divided so, or the model has no such blocks.
        RuntimeError: the layout obtained is not the one asked for.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

    blocks = [module for module in denoiser.modules() if type(module).__name__ in block_classes]
    if not blocks:
        raise ConfigError(
            Problem(f"{type(denoiser).__name__} has no {' or '.join(block_classes)} to spread", key="fsdp_enable")
        )
    options: dict[str, Any] = {
        "mesh": mesh or make_mesh(process_group, device, shard_size),
        "ignored_params": whole,
        "offload_policy": CPUOffloadPolicy() if offloads else OffloadPolicy(),
        # Inputs stay as they are: autocast knows better which of them are to be float32.
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if computes_in == torch.float32 else computes_in,
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,
        ),
    }
    for parameter in whole:  # `fully_shard` moves only what it spreads
        parameter.data = parameter.data.to(device)
    for block in blocks:
        fully_shard(block, reshard_after_forward=reshards, **options)
    fully_shard(denoiser, **options)
    for module in denoiser.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
    _require_spread(denoiser, whole, process_group, shard_size)


def make_mesh(process_group: ProcessGroup, device: torch.device, shard_size: int | None) -> DeviceMesh:
    """Which processes share a copy of the weights; all processes have to call it at the same time.

    Raises:
        ConfigError: the processes cannot be divided so.
    """
    from torch.distributed.device_mesh import init_device_mesh

    size = shard_size or process_group.size
    if process_group.size % size:
        raise ConfigError(
            Problem(
                f"{size} does not divide the {process_group.size} processes", key="fsdp_shard_size", allowed="a divisor"
            )
        )
    if size == process_group.size:
        return init_device_mesh(device.type, (process_group.size,))
    return init_device_mesh(device.type, (process_group.size // size, size), mesh_dim_names=("copies", "parts"))


def _require_spread(
    denoiser: nn.Module, whole: set[nn.Parameter], process_group: ProcessGroup, shard_size: int | None
) -> None:
    """Raise where a parameter is not spread as asked: a silent fall-back would be found by an out-of-memory error."""
    from torch.distributed.tensor import DTensor

    size = shard_size or process_group.size
    for name, parameter in denoiser.named_parameters():
        if parameter in whole:
            continue
        if not isinstance(parameter, DTensor) or not any(place.is_shard() for place in parameter.placements):
            raise RuntimeError(f"{name} is not sharded across the processes")
        part = parameter.to_local().shape[0] if parameter.ndim else 0
        if part > -(-parameter.shape[0] // size):
            raise RuntimeError(f"process {process_group.rank} holds {part} of {parameter.shape[0]} rows of {name}")


def spread_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of which this process holds a part, by name."""
    from torch.distributed.tensor import DTensor

    for name, parameter in module.named_parameters():
        if isinstance(parameter, DTensor):
            yield name, parameter
