"""Options of runs with several processes. The launcher reads the first five; torch's own variables mean the same."""

from __future__ import annotations

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, FilePath, Float, Int, Text


class ProcessOptions(OptionGroup):
    """Several processes"""

    num_processes: Int | None = option(
        None,
        help="Processes on each machine, one per accelerator. Unset: one for each accelerator that is visible, one in "
        "all where there is none. TRAINING_NUM_PROCESSES sets it too. Each process takes `train_batch_size` images.",
        ge=1,
    )
    num_machines: Int = option(
        1, help="Machines of this run, all with the same number of processes; TRAINING_NUM_MACHINES sets it too.", ge=1
    )
    machine_rank: Int = option(
        0, help="Which of the machines this is; 0 is the one that writes. NODE_RANK and MACHINE_RANK set it too.", ge=0
    )
    main_process_ip: Text = option(
        "127.0.0.1", help="Address of machine 0, as the others reach it; MASTER_ADDR sets it too."
    )
    main_process_port: Int | None = option(
        None,
        help="Port on machine 0; unset, a free one, where there is only one machine. MASTER_PORT sets it too.",
        ge=1,
        le=65535,
    )
    distributed_timeout: Float = option(
        10.0,
        help="Minutes without any sign of another process (it is frozen, or the network has dropped) after which the "
        "others end. A process that works, however long, gives signs.",
        unit="minutes",
        gt=0,
    )
    fsdp_enable: Bool = option(
        False,
        help="Spread the denoiser's weights over the processes (FSDP2): each holds its part and fetches a block's "
        "others when it is its turn. For models that do not fit one device.",
    )
    fsdp_reshard_after_forward: Bool = option(
        True,
        help="Let go of a block's fetched weights after its forward pass and fetch them again for the backward pass: "
        "least memory. false keeps them (ZeRO-2).",
    )
    fsdp_shard_size: Int | None = option(
        None,
        help="Processes that share one copy of the weights; several such groups hold a copy each (hybrid sharding). "
        "Unset: all processes share one. It must divide the number of processes.",
        ge=2,
    )
    fsdp_cpu_offload: Bool = option(
        False,
        help="Keep the sharded weights in main memory and fetch each block's to the device: slow, least memory.",
    )
    deepspeed_config: FilePath | None = option(
        None,
        help="DeepSpeed configuration file: its ZeRO stage decides what is sharded across the processes: 1 the "
        "optimizer's state, 2 gradients too, 3 weights too. Needs several processes.",
        path="input",
    )
    context_parallel_size: Int = option(
        1, help="Processes that share one sequence.", planned="each process works on whole images", ge=1
    )
