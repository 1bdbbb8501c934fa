"""How many processes a configuration means on this machine."""

from __future__ import annotations

import os

from simpletuner.config.options.processes import ProcessOptions
from simpletuner.distributed.launcher import Layout
from simpletuner.hardware import amd_gpus, nvidia_gpus


def layout_of(options: ProcessOptions) -> Layout:
    """The processes of `num_processes`, or one for each accelerator that is visible."""
    return Layout(
        num_processes=options.num_processes or max(visible_accelerators(), 1),
        num_machines=options.num_machines,
        machine_rank=options.machine_rank,
        address=options.main_process_ip,
        port=options.main_process_port,
    )


def visible_accelerators() -> int:
    """Accelerators that the driver reports and `CUDA_VISIBLE_DEVICES` or `HIP_VISIBLE_DEVICES` leaves visible."""
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if variable in os.environ:
            return len([name for name in os.environ[variable].split(",") if name.strip() not in ("", "-1")])
    return len(nvidia_gpus() or amd_gpus())
