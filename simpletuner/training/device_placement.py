"""Puts the denoiser where it trains: whole on this process's device, or spread over all processes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import psutil
from torch import nn

from simpletuner.adapters.base import Adapter
from simpletuner.adapters.full import FullAdapter
from simpletuner.config.deepspeed import read_deepspeed, stage_of
from simpletuner.config.options import TrainConfig
from simpletuner.config.options.processes import ProcessOptions
from simpletuner.distributed.placement import Placement, Replicated, Sharded
from simpletuner.distributed.process_group import ProcessGroup
from simpletuner.distributed.sharding import make_mesh, shard_denoiser, spread_parameters
from simpletuner.distributed.zero import Zero
from simpletuner.errors import ConfigError, Problem
from simpletuner.models.family import ModelFamily
from simpletuner.precision.mixed import DTYPES
from simpletuner.training.disk_space import denoiser_bytes
from simpletuner.training.swapping import move_with_swap, repeated_blocks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

# Main memory for weights while they are read: the file, and what is made of it.
ROOM_TO_LOAD = 1.5


def is_denoiser_spread(options: ProcessOptions) -> bool:
    """Whether a forward pass needs all processes, since each holds a part of the denoiser."""
    if options.deepspeed_config:
        return stage_of(read_deepspeed(Path(options.deepspeed_config))) == 3
    return options.fsdp_enable


def must_take_turns(config: TrainConfig, family: ModelFamily, process_group: ProcessGroup) -> bool:
    """Whether the processes of a machine load the denoiser one after the other; the same in all processes.

    Each of them reads all weights, also where it then keeps a part of them (FSDP2) or moves them to its device and
    spreads them there (DeepSpeed).
    """
    if process_group.size == 1:
        return False
    size = denoiser_bytes(family.spec, family.source, config.model)
    num_here = max(process_group.gather(process_group.local_rank)) + 1
    return process_group.any(num_here * size * ROOM_TO_LOAD > psutil.virtual_memory().available)


def mesh_of(options: ProcessOptions, family: ModelFamily, process_group: ProcessGroup) -> DeviceMesh | None:
    """The processes that share the weights (FSDP2), for `place_denoiser`; before they load one after the other."""
    if not options.fsdp_enable or process_group.size == 1:
        return None
    return make_mesh(process_group, family.device, options.fsdp_shard_size)


def place_denoiser(
    config: TrainConfig,
    family: ModelFamily,
    denoiser: nn.Module,
    adapter: Adapter,
    process_group: ProcessGroup,
    mesh: DeviceMesh | None = None,
) -> Placement:
    """Move a denoiser with its adapter to where it trains; no process waits for another.

    An adapter stays whole on each process; without one, each process trains its part of the weights.

    Args:
        mesh: of `mesh_of`.

    Raises:
        ConfigError: fsdp_enable with a single process, or processes that cannot be divided as asked.
    """
    processes = config.processes
    if not (processes.fsdp_enable or processes.deepspeed_config):
        count = config.model.musubi_blocks_to_swap
        if config.model.enable_group_offload:
            count = len(repeated_blocks(denoiser, family.spec.block_classes))
        move_with_swap(denoiser, family.spec.block_classes, count, family.device)
        return Replicated(adapter.trainable_parameters(), process_group)
    if process_group.size == 1:
        raise ConfigError(
            Problem(
                "this run has one process, which has nobody to share the weights with",
                key="fsdp_enable" if processes.fsdp_enable else "deepspeed_config",
                fix="set num_processes above 1, or remove the key",
            )
        )
    if processes.deepspeed_config:
        denoiser.to(family.device)
        return Zero(
            adapter.trainable_parameters(),
            process_group,
            denoiser,
            read_deepspeed(Path(processes.deepspeed_config)),
            accumulation=config.training.gradient_accumulation_steps,
            max_grad_norm=config.optimizer.max_grad_norm or 0.0,
            is_adapter=not isinstance(adapter, FullAdapter),
        )
    return _shard(config, family, denoiser, adapter, process_group, mesh)


def _shard(
    config: TrainConfig,
    family: ModelFamily,
    denoiser: nn.Module,
    adapter: Adapter,
    process_group: ProcessGroup,
    mesh: DeviceMesh | None,
) -> Placement:
    """Spread the denoiser over the processes (FSDP2); an adapter stays whole."""
    whole = set() if isinstance(adapter, FullAdapter) else set(adapter.all_parameters())
    shard_denoiser(
        denoiser,
        family.spec.block_classes,
        process_group,
        family.device,
        whole=whole,
        shard_size=config.processes.fsdp_shard_size,
        reshards=config.processes.fsdp_reshard_after_forward,
        offloads=config.processes.fsdp_cpu_offload,
        computes_in=DTYPES[config.precision.mixed_precision],
        mesh=mesh,
    )
    if not isinstance(adapter, FullAdapter):
        return Replicated(adapter.trainable_parameters(), process_group)
    parts = Sharded(dict(spread_parameters(denoiser)), process_group, adapter.rates.keys())
    adapter.use_parts(parts.parameters, parts.frozen)
    return parts
