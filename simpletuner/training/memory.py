"""How much memory a run takes, for the progress line."""

from __future__ import annotations

import sys

import torch


def memory_gb(device: torch.device) -> float:
    """Peak memory in GiB: of the accelerator where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows, which is refused at the start

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
