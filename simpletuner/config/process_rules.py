"""What must hold between the options of runs with several processes."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.draft import Draft
from simpletuner.errors import Problem


def machine_rank_is_one_of_the_machines(draft: Draft) -> Iterator[Problem]:
    rank, count = draft.config.machine_rank, draft.config.num_machines
    if rank >= count:
        yield draft.problem(
            f"{rank} is no machine of {count}",
            "machine_rank",
            f"0 to {count - 1}",
            fix="count from 0, and give every machine the same num_machines",
        )


def several_machines_know_where_to_meet(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.num_machines == 1:
        return
    if config.main_process_ip in ("127.0.0.1", "localhost"):
        yield draft.problem(
            "is this machine's own address, which the other machines cannot reach",
            "main_process_ip",
            "the address of machine 0 (MASTER_ADDR)",
            fix="set it, the same on all machines",
        )
    if config.main_process_port is None:
        yield draft.problem(
            "is not set: a free port would be another one on each machine",
            "main_process_port",
            "a port that is open on machine 0 (MASTER_PORT)",
            fix="set it, for example 29500, the same on all machines",
        )


def sharding_has_processes_to_share(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if not config.fsdp_enable:
        for key in ("fsdp_shard_size", "fsdp_cpu_offload"):
            if getattr(config, key):
                yield draft.problem("has no use without fsdp_enable", key, fix="set fsdp_enable, or remove the key")
        return
    if config.num_processes is None:
        return
    size = config.num_processes * config.num_machines
    if size == 1:
        yield draft.problem("one process has nobody to share with", "fsdp_enable", fix="set num_processes above 1")
    elif config.fsdp_shard_size and size % config.fsdp_shard_size:
        yield draft.problem(
            f"{config.fsdp_shard_size} does not divide the {size} processes", "fsdp_shard_size", "a divisor of them"
        )


def sharding_takes_plain_weights(draft: Draft) -> Iterator[Problem]:
    precision = draft.config.base_model_precision
    if draft.config.fsdp_enable and precision not in (None, "no_change"):
        yield draft.problem(
            f'cannot spread weights quantised as "{precision}": their packed form has no parts',
            "fsdp_enable",
            fix="set base_model_precision to no_change: spread over two processes, bf16 takes what int8 takes on one",
        )


PROCESS_RULES = (
    machine_rank_is_one_of_the_machines,
    several_machines_know_where_to_meet,
    sharding_has_processes_to_share,
    sharding_takes_plain_weights,
)
