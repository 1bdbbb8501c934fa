"""Paths that a table names: they stay inside the dataset's folder, whatever the table says.

Tables are downloaded from strangers. One that names `../../.ssh/id_rsa` or `/etc/passwd` must not have it read.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from simpletuner.data.backends.base import UnusableFile

_DRIVE = re.compile(r"[A-Za-z]:")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(name: str) -> bool:
    """Whether a table's entry is an address and not a path."""
    return _SCHEME.match(name.strip()) is not None


def path_inside(root: Path, name: str) -> bytes:
    """A table's path relative to `root`, `/`-separated; backslashes count as `/`, as tables from Windows write them.

    Absolute paths are taken where they lie in `root`. Links are judged by where they lie, not by where they lead: only
    the owner of the folder can have put them there.

    Raises:
        UnusableFile: it leads out of `root`, or names nothing.
    """
    if "\0" in name or not name.strip():
        raise UnusableFile("names no file")
    if _DRIVE.match(name):
        raise UnusableFile("refused for safety: leads out of the dataset's folder")
    base = os.path.normpath(root.absolute())
    full = os.path.normpath(PurePosixPath(base) / name.replace("\\", "/"))
    if not full.startswith(os.path.join(base, "")):  # noqa: PTH118 - a text comparison, with the separator at the end
        raise UnusableFile("refused for safety: leads out of the dataset's folder")
    return os.fsencode(os.path.relpath(full, base))
