"""How much memory a run takes, and the limit that it keeps."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from simpletuner.allocation import give_back_at_once


def keep_within(num_bytes: int, device: torch.device) -> None:
    """Let torch take no more of a GPU: drivers of Windows (WSL too) else go on in main memory, tens of times slower."""
    if device.type == "cuda":
        share = num_bytes / torch.cuda.mem_get_info(device)[1]
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    elif device.type == "cpu":
        give_back_at_once()


def memory_gb(device: torch.device) -> float:
    """Peak memory in GiB: of the accelerator where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_bytes() / 2**30


def peak_bytes() -> int:
    """The most main memory that this program has held.

    Linux keeps `ru_maxrss` over the start of a program: there it is at least what the process held that started this
    one. `VmHWM` is of the program alone.
    """
    if sys.platform == "linux":
        found = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    import resource  # not on Windows, which is refused at the start

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
