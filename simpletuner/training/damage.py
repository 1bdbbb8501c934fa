"""Checkpoints that cannot be used: damaged for good, or only not readable now.

A damaged one is renamed so that the run can write its step again, and only where an older one is whole. Where a disk
refuses to read, a newer version wrote it, or nothing whole is left, nothing is renamed: the run ends with the reason,
at each start, until somebody acts. A run in a used folder never begins at step 0 by itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from pathlib import Path

from simpletuner import storage
from simpletuner.errors import ConfigError, DataError, Problem

RESUME = "resume_from_checkpoint"
# What says that a file is not there, or not any more: damage, which no waiting fixes.
_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


def first_whole(paths: Sequence[Path]) -> tuple[Path | None, list[str]]:
    """The first of `paths` that is whole, and a line for each before it, which is then called `damaged-...`.

    Args:
        paths: checkpoints, the newest first.

    Raises:
        DataError: a newer one cannot be read now; nothing is renamed.
        ConfigError: all are damaged; nothing is renamed.
    """
    damaged: list[tuple[Path, str]] = []
    for path in paths:
        faults = storage.verify_dir(path)
        if not faults:
            return path, [_rename(*each) for each in damaged]
        if reason := why_unreadable(path):
            raise DataError(_unreadable(path, reason, paths))
        damaged.append((path, faults[0]))
    if damaged:
        raise ConfigError(_all_damaged(damaged))
    return None, []


def why_unreadable(path: Path) -> str | None:
    """Why a checkpoint cannot be read by this program now, though it may be whole; None where it is damaged."""
    try:
        raw = storage.read_json(path / storage.MANIFEST)
    except DataError as error:
        cause = error.__cause__
        return cause.strerror if isinstance(cause, OSError) and cause.errno not in _MISSING else None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version > storage.FORMAT_VERSION:
        return f"a newer version of simpletuner wrote it (format {version})"
    files = raw.get("files") if isinstance(raw, dict) else None
    for name in files if isinstance(files, dict) else ():
        try:
            if (path / name).is_file():  # and no pipe, which would be waited for
                storage.file_digest(path / name)
        except OSError as error:
            if error.errno not in _MISSING:
                return f"{name}: {error.strerror}"
    return None


def free_name(path: Path, prefix: str = "damaged") -> Path:
    """`damaged-<name>`, with a number behind it where that is taken."""
    number, free = 2, path.with_name(f"{prefix}-{path.name}")
    while os.path.lexists(free):
        free = path.with_name(f"{prefix}-{path.name}-{number}")
        number += 1
    return free


def _rename(path: Path, fault: str) -> str:
    aside = free_name(path)
    with contextlib.suppress(DataError):
        storage.move(path, aside)
        return f"{path.name} is damaged ({fault}); it was renamed to {aside.name}"
    return f"{path.name} is damaged ({fault}), and cannot be renamed"


def _unreadable(path: Path, reason: str, paths: Sequence[Path]) -> Problem:
    older = paths[list(paths).index(path) + 1 :]
    whole = next((each for each in older if not storage.verify_dir(each, full=False)), None)
    back = f", or go on from an older one: {RESUME}={whole.name}" if whole else ""
    fix = f"make it readable (its disk, permissions, or the newer version) and start again{back}"
    return Problem(f"cannot be read now: {reason}; nothing was changed", key=RESUME, file=str(path), fix=fix)


def _all_damaged(damaged: Sequence[tuple[Path, str]]) -> Problem:
    path, fault = damaged[0]
    others = f" ({len(damaged)} of them)" if len(damaged) > 1 else ""
    return Problem(
        f"every checkpoint in {path.parent} is damaged{others}: {path.name}: {fault}; nothing was changed",
        key=RESUME,
        allowed="latest, a whole checkpoint's path, or none for a fresh start",
        fix=f"copy a whole checkpoint back, or set {RESUME}=none: a fresh start, which deletes nothing",
    )
