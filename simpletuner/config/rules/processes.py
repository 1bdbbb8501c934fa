"""What must hold between the options of runs with several processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from simpletuner.config.deepspeed import read_deepspeed, stage_of
from simpletuner.config.draft import Draft
from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.errors import ConfigError, Problem


def machine_rank_is_one_of_the_machines(draft: Draft) -> Iterator[Problem]:
    rank, count = draft.config.processes.machine_rank, draft.config.processes.num_machines
    if rank >= count:
        yield draft.problem(
            f"{rank} is not a machine of {count}",
            "machine_rank",
            f"0 to {count - 1}",
            fix="count from 0, and give every machine the same num_machines",
        )


def several_machines_know_where_to_meet(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.processes.num_machines == 1:
        return
    if config.processes.main_process_ip in ("127.0.0.1", "localhost"):
        yield draft.problem(
            "is this machine's own address, which the other machines cannot reach",
            "main_process_ip",
            "the address of machine 0 (MASTER_ADDR)",
            fix="set it, the same on all machines",
        )
    if config.processes.main_process_port is None:
        yield draft.problem(
            "is not set: a free port would be another one on each machine",
            "main_process_port",
            "a port that is open on machine 0 (MASTER_PORT)",
            fix="set it, for example 29500, the same on all machines",
        )


def sharding_has_processes_to_share(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if not config.processes.fsdp_enable:
        for key in ("fsdp_shard_size", "fsdp_cpu_offload"):
            if config.value(key):
                yield draft.problem("has no use without fsdp_enable", key, fix="set fsdp_enable, or remove the key")
        return
    if config.processes.num_processes is None:
        return
    size = config.processes.num_processes * config.processes.num_machines
    if size == 1:
        yield draft.problem("one process has no other to share with", "fsdp_enable", fix="set num_processes above 1")
    elif config.processes.fsdp_shard_size and size % config.processes.fsdp_shard_size:
        yield draft.problem(
            f"{config.processes.fsdp_shard_size} does not divide the {size} processes",
            "fsdp_shard_size",
            "a divisor of them",
        )


def sharding_takes_plain_weights(draft: Draft) -> Iterator[Problem]:
    precision = draft.config.precision.base_model_precision
    if draft.config.processes.fsdp_enable and precision not in (None, "no_change"):
        yield draft.problem(
            f'cannot shard weights quantized as "{precision}": their packed form cannot be split',
            "fsdp_enable",
            fix="set base_model_precision to no_change: sharded over two processes, bf16 takes what int8 takes on one",
        )


def the_deepspeed_file_can_be_used(draft: Draft) -> Iterator[Problem]:
    config, path = draft.config, draft.config.processes.deepspeed_config
    if path is None:
        return
    try:
        settings = read_deepspeed(Path(path))
    except ConfigError as error:
        yield from error.problems
        return
    is_third = stage_of(settings) == 3
    row = OPTIMIZERS.get(config.optimizer.optimizer)
    if config.processes.fsdp_enable:
        message = "shards the model as fsdp_enable does"
        yield draft.problem(message, "deepspeed_config", fix="remove one of the two")
    if config.processes.num_processes == 1 and config.processes.num_machines == 1:
        message = "one process has no other to share with"
        yield draft.problem(message, "deepspeed_config", fix="set num_processes above 1")
    if config.optimizer.max_grad_norm and config.optimizer.grad_clip_method == "value":
        message = "DeepSpeed clips by norm only"
        yield draft.problem(message, "grad_clip_method", '"norm"', fix="set it to norm")
    if config.precision.mixed_precision == "fp16":
        message = "scales losses, which DeepSpeed's own step would not know"
        yield draft.problem(message, "mixed_precision", "bf16, no", fix="use bf16")
    if row and (row.averages or not row.elementwise):
        message = (
            f"{config.optimizer.optimizer} looks at whole weights, and DeepSpeed moves parts of them laid end to end"
        )
        yield draft.problem(message, "optimizer", fix="use adamw_bf16 or lion")
    if is_third and config.training.use_ema:
        message = "the average needs the weights that stage 3 shards"
        yield draft.problem(message, "use_ema", "false with ZeRO stage 3", fix="use fsdp_enable, which keeps an EMA")
    if is_third and config.precision.base_model_precision not in (None, "no_change"):
        message = "stage 3 shards plain weights only"
        yield draft.problem(message, "base_model_precision", "no_change", fix="use stage 2")


PROCESS_RULES = (
    machine_rank_is_one_of_the_machines,
    several_machines_know_where_to_meet,
    sharding_has_processes_to_share,
    sharding_takes_plain_weights,
    the_deepspeed_file_can_be_used,
)
