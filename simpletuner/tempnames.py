"""Names of what is half-written, from which anybody can tell later whether its writer still lives; and its removal.

`.tmp-` is being written, `.trash-` is being removed, `.aside-` was moved out of the way of its successor and ends with
the name that it had. Host, pid and start time of the process follow, since pids come again.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["tmp", "trash", "aside"]

_PATTERN = re.compile(
    r"\.(?P<kind>tmp|trash|aside)-(?P<host>\w{8})-(?P<pid>\d+)-(?P<second>\d+)-\w{8}(?:-(?P<name>.+))?"
)
_OTHER_HOST_SECONDS = 24 * 3600
# Allows for a clock that was set in between.
_CLOCK_SECONDS = 2


@dataclass(frozen=True)
class StaleName:
    """What the name of a left-over tells.

    Args:
        final_name: what an `aside` was called, else None.
    """

    host: str
    pid: int
    start_second: int
    final_name: str | None

    @property
    def is_of_another_host(self) -> bool:
        return self.host != host_digest()

    def is_owner_alive(self, path: Path) -> bool:
        """Whether its writer may still work on it; another machine's counts as alive for a day."""
        if self.is_of_another_host:
            try:
                return time.time() - path.stat().st_mtime < _OTHER_HOST_SECONDS
            except OSError:
                return True
        started = _start_second(self.pid)
        return started is not None and abs(started - self.start_second) <= _CLOCK_SECONDS


def new_sibling(path: Path, kind: Kind) -> Path:
    """A name beside `path` that this process has never used."""
    name = f".{kind}-{host_digest()}-{os.getpid()}-{_own_start_second()}-{uuid.uuid4().hex[:8]}"
    return path.with_name(f"{name}-{path.name}" if kind == "aside" else name)


def parse_name(name: str) -> StaleName | None:
    """None for a name that is not ours."""
    match = _PATTERN.fullmatch(name)
    if match is None:
        return None
    kind, host, pid, second, final_name = match.group("kind", "host", "pid", "second", "name")
    return StaleName(host, int(pid), int(second), final_name if kind == "aside" else None)


def clean_stale(parent: str | Path, is_locked: bool = False) -> list[Path]:
    """Clear up in `parent` after processes that died: remove what they left half-written, put back what they had moved
    aside and not replaced. Call it before looking for committed folders.

    What living processes work on stays; so does, for a day, what comes from another machine.

    Args:
        is_locked: this process holds the lock of the folder, so that what comes from another machine has no owner.

    Returns:
        What was removed or put back, by its left-over path.
    """
    parent = Path(parent)
    try:
        found = sorted(parent.iterdir()) if parent.is_dir() else []
    except OSError:  # a later start clears up
        return []
    handled = []
    for stale in found:
        parsed = parse_name(stale.name)
        if parsed is None or (parsed.is_owner_alive(stale) and not (is_locked and parsed.is_of_another_host)):
            continue
        try:
            if parsed.final_name is not None and not (parent / parsed.final_name).exists():
                stale.rename(parent / parsed.final_name)
            elif stale.is_dir() and not stale.is_symlink():
                shutil.rmtree(stale)
            else:
                stale.unlink()
        except OSError:  # another process clears up as well, or the folder cannot be written: no harm in its staying
            continue
        handled.append(stale)
    return handled


def clean_stale_tree(root: str | Path, is_locked: bool = False) -> list[Path]:
    """`clean_stale` in a folder and all folders below it; links are not followed."""
    handled = []
    for folder, names, _ in os.walk(root):
        handled += clean_stale(folder, is_locked)
        names[:] = [name for name in names if parse_name(name) is None]
    return handled


@functools.cache
def _own_start_second() -> int | None:
    """Of this process. Asking for each file took a sixth of what a small checkpoint costs beside its bytes."""
    return _start_second(os.getpid())


os.register_at_fork(after_in_child=_own_start_second.cache_clear)


def host_digest() -> str:
    """Eight characters for the name of this machine."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _start_second(pid: int) -> int | None:
    """When a process started, in seconds since 1970; None if there is no such process."""
    import psutil

    try:
        return int(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return None
