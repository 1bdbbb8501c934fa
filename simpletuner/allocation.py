"""What glibc does with main memory that was freed: keep it for the next tensor, or give it back to the system.

By its defaults glibc gives back each large piece at once and asks for it again a moment later. The system then fills
it with zeros page by page: up to 40 % of the time of a small VAE on a CPU. Elsewhere than on glibc nothing is done.
"""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# The largest piece that glibc takes from its heap; what is larger is mapped by itself.
_LARGEST_OF_HEAP = 32 << 20
_KEPT = 256 << 20
_LARGE, _DEFAULT_TRIM = 1 << 20, 128 << 10


def keep_freed_memory() -> None:
    """Let glibc keep up to 256 MiB that were freed, for tensors of the same size that are made again and again."""
    _set(_M_MMAP_THRESHOLD, _LARGEST_OF_HEAP)
    _set(_M_TRIM_THRESHOLD, _KEPT)


def give_back_at_once() -> None:
    """Let glibc map each large piece of memory by itself, so that it goes back to the system when it is freed.

    Otherwise it keeps pieces of up to 32 MB, and a step on the CPU takes up to four times what its tensors take.
    """
    _set(_M_MMAP_THRESHOLD, _LARGE)
    _set(_M_TRIM_THRESHOLD, _DEFAULT_TRIM)


def _set(parameter: int, value: int) -> None:
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(parameter, value)
