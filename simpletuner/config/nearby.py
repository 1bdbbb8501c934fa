"""What lies where a path leads, or almost where it leads: a misspelled file is found by its neighbors."""

from __future__ import annotations

import difflib
import os
from itertools import islice
from pathlib import Path

# Of a folder, when a similar name is looked for: a folder of images may have millions.
MAX_NAMES = 10_000


def exists(path: Path) -> bool:
    """Whether something is there; a name that is too long for the disk names nothing."""
    try:
        return path.exists()
    except OSError:
        return False


def nearest_path(path: Path) -> Path | None:
    """The existing path whose parts are those of `path`, or are spelled almost like them."""
    if exists(path):
        return path
    if path == path.parent:
        return None
    parent = nearest_path(path.parent)
    if parent is None or not parent.is_dir():
        return None
    if exists(parent / path.name):
        return parent / path.name
    try:
        names = [entry.name for entry in islice(os.scandir(parent), MAX_NAMES)]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return parent / near[0] if near else None
