"""Where files of tests cost no disk."""

from __future__ import annotations

import os
import shutil

MEMORY = "/dev/shm"
ENOUGH_BYTES = 4 << 30  # containers are often given 64 MB


def memory_folder() -> str | None:
    """A folder in memory, if there is one with room: on a disk an fsync takes milliseconds, and a run makes sixty."""
    has_room = os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > ENOUGH_BYTES
    return MEMORY if has_room else None
