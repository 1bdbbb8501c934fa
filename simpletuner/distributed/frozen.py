"""Whether a process of this machine is stopped (SIGSTOP) and answers nothing.

A heartbeat that fails to come shows this too, for processes of other machines as well, but only after a while.
"""

from __future__ import annotations

import os
from pathlib import Path


def address() -> str:
    """Names this process to others that see the same processes; they compare the part before the last slash."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{machine}/{Path('/proc/self/ns/pid').readlink()}/{os.getpid()}"
    except OSError:
        return f"unknown/{os.getpid()}"


def is_frozen_at(other: str) -> bool:
    """Whether the process of an `address` is stopped or gone; False where this process cannot see it."""
    place, _, pid = other.rpartition("/")
    return place != "unknown" and place == address().rpartition("/")[0] and is_frozen(int(pid))


def is_frozen(pid: int) -> bool:
    """Whether a process of this machine is stopped or gone."""
    import psutil

    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
