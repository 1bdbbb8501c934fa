"""How much memory a run takes, for the progress line."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch


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
