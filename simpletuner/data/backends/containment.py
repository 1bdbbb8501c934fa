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


class Fence:
    """Where the links of a folder may lead.

    A folder may come from a stranger, in an archive or a copied tree: a link in it to `~/.ssh` must not be followed.
    A snapshot in the cache of huggingface_hub is made of links to the blobs beside it, which are its own.

    Args:
        root: the folder, resolved.
        follows_outside: the user allows every link (`follow_outside_links`).
    """

    def __init__(self, root: bytes, follows_outside: bool):
        self._places = None if follows_outside else [os.path.join(place, b"") for place in (root, *_blobs_of(root))]  # noqa: PTH118 - names are bytes
        self._folders: dict[bytes, tuple[tuple[int, int], bool]] = {}

    def keeps_out(self, path: bytes) -> bool:
        """Whether a file or folder, links followed, lies outside."""
        if self._places is None:
            return False
        real = os.path.realpath(path)
        return not any(real.startswith(place) or real == place[:-1] for place in self._places)

    def keeps_out_folder(self, path: bytes) -> bool:
        """`keeps_out` of a folder, for each file that is read in it: one request to the system instead of one for each
        part of the path, as long as the path leads to the same folder."""
        if self._places is None:
            return False
        status = os.stat(path)  # noqa: PTH116 - names are bytes, Path is text
        identity = (status.st_dev, status.st_ino)
        known = self._folders.get(path)
        if known is None or known[0] != identity:
            known = self._folders[path] = (identity, self.keeps_out(path))
        return known[1]


def _blobs_of(root: bytes) -> list[bytes]:
    """`.../datasets--owner--name/snapshots/REVISION/...` -> its `blobs`."""
    parts = root.split(b"/")
    for index in range(len(parts) - 1, 0, -1):
        if parts[index] == b"snapshots" and re.fullmatch(rb"(?:models|datasets|spaces)--.+", parts[index - 1]):
            return [b"/".join([*parts[:index], b"blobs"])]
    return []


def path_inside(root: Path, name: str) -> bytes:
    """A table's path relative to `root`, `/`-separated; backslashes count as `/`, as tables from Windows write them.

    Absolute paths are taken where they lie in `root`. Links are judged by `Fence`, when the file is read.

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
