"""A folder on this machine.

Links within the folder are followed, to files and to folders, since link farms are how people make subsets; those that
lead out of it only where the dataset says so. A folder that is reached a second time is not entered again, which also
ends loops. Names that begin with a dot are not looked at: other programs keep thumbnails and resource forks there.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from simpletuner.data.backends.base import (
    MAX_FILE_BYTES,
    NO_FILE,
    NOT_READ,
    OUTSIDE,
    TOO_LARGE,
    FileStat,
    Folder,
    UnusableFile,
    join,
)
from simpletuner.data.backends.containment import Fence
from simpletuner.data.captions import CAPTION_SUFFIXES
from simpletuner.data.transforms import SUFFIXES, UNREAD_SUFFIXES

T = TypeVar("T")

# Of the captions that tables show as files.
CAPTION_SUFFIX = CAPTION_SUFFIXES[0]
_SUFFIXES = SUFFIXES | UNREAD_SUFFIXES.keys() | {*CAPTION_SUFFIXES}
# Passing faults of network mounts; anything else is answered at once.
_RETRIED = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
# Of a link that is not followed; BSD's own comes second.
_IS_LINK = (errno.ELOOP, errno.EMLINK)
_ATTEMPTS = 3
_PAUSE_SECONDS = 0.5
# Files per update of a listing's digest.
_CHUNK = 4096
_INT64_MAX = 2**63 - 1


class LocalBackend:
    """See `Backend`.

    Args:
        root: the folder; it must exist.
        follows_outside: links that lead out of it are followed too.
    """

    def __init__(self, root: str | Path, follows_outside: bool = False):
        self._root = os.fsencode(Path(root).resolve())
        self._fence = Fence(self._root, follows_outside)
        self.location = str(root)
        self.identity = os.fsdecode(self._root) + (" with links that lead out" if follows_outside else "")
        self.num_readers = None

    def folders(self) -> Iterator[Folder]:
        pending, entered = [b""], set()
        while pending:
            path = pending.pop()
            try:
                if self._leads_out(path):
                    yield Folder(path, error=NOT_READ[OUTSIDE])
                    continue
                status = _retried(os.stat, self._absolute(path))
                if (status.st_dev, status.st_ino) in entered:
                    continue
                entered.add((status.st_dev, status.st_ino))
                listing, subfolders = _retried(self._list, path)
            except OSError as error:
                yield Folder(path, error=error.strerror or str(error))
                continue
            # Sorted: which of two ways to one folder is taken must not depend on the order of the listing.
            pending.extend(join(path, name) for name in sorted(subfolders, reverse=True))
            yield Folder(path, listing)

    def files(self, folder: bytes) -> Iterator[FileStat]:
        with os.scandir(os.fsdecode(self._absolute(folder))) as entries:
            for entry in entries:
                if is_wanted(entry.name) and not _is_folder(entry):
                    name = os.fsencode(entry.name)
                    numbers = self.numbers(join(folder, name)) if entry.is_symlink() else file_numbers(entry)
                    yield FileStat(name, *numbers)

    def read(self, path: bytes) -> bytes:
        return _retried(self._read_once, path)

    def _read_once(self, path: bytes) -> bytes:
        descriptor = self._open(self._absolute(path))
        try:
            before = os.fstat(descriptor)
            if not stat.S_ISREG(before.st_mode):
                raise UnusableFile(NOT_READ[NO_FILE])
            if before.st_size > MAX_FILE_BYTES:
                raise UnusableFile(NOT_READ[TOO_LARGE])
            data = os.read(descriptor, before.st_size)  # its buffer is as large as what is asked for
            while len(data) < before.st_size and (more := os.read(descriptor, before.st_size - len(data))):
                data += more
            after = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or len(data) != after.st_size:
            raise OSError(errno.EAGAIN, "it changed while it was read")
        return data

    def _open(self, absolute: bytes) -> int:
        """A descriptor of a file that the dataset may read; links are judged before anything is opened."""
        # Not blocking: opening a pipe that took an image's name would wait for a writer forever.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)
        if self._fence.keeps_out_folder(os.path.dirname(absolute)):  # noqa: PTH120 - names are bytes, Path is text
            raise UnusableFile(NOT_READ[OUTSIDE])
        if hasattr(os, "O_NOFOLLOW"):
            try:
                return os.open(absolute, flags | os.O_NOFOLLOW)
            except OSError as error:
                if error.errno not in _IS_LINK:
                    raise
        if self._fence.keeps_out(absolute):
            raise UnusableFile(NOT_READ[OUTSIDE])
        return os.open(absolute, flags)

    def numbers(self, path: bytes) -> tuple[int, int, int, int]:
        """Size, mtime_ns, ctime_ns and inode of a file, as in `FileStat`."""
        place = Path(os.fsdecode(self._absolute(path)))
        if self._leads_out(path):
            return OUTSIDE if place.exists() else NO_FILE, 0, 0, 0
        return file_numbers(place)

    def _leads_out(self, path: bytes) -> bool:
        """Whether a link may not be followed; of what is no link, its folder decides."""
        absolute = self._absolute(path)
        return bool(path) and os.path.islink(absolute) and self._fence.keeps_out(absolute)  # noqa: PTH114 - bytes

    def _absolute(self, path: bytes) -> bytes:
        return os.path.join(self._root, path)  # noqa: PTH118 - names are bytes, Path is text

    def _list(self, folder: bytes) -> tuple[bytes, list[bytes]]:
        """Digest of a folder's listing, and the names of its subfolders.

        The digest follows the order in which the system lists: another order only costs a look at each file. Every
        file of a dataset passes here at each start, so this is written for speed.
        """
        digest = hashlib.blake2b(digest_size=16)
        names: list[str] = []
        numbers: list[int] = []
        subfolders: list[bytes] = []
        with os.scandir(os.fsdecode(self._absolute(folder))) as entries:
            for entry in entries:
                name = entry.name
                # The usual file, without a call of ours, for there may be millions; the rest goes the other way.
                if name[name.rfind(".") :] in _SUFFIXES and name[0] != "." and entry.is_file(follow_symlinks=False):
                    try:
                        status = entry.stat(follow_symlinks=False)
                        mtime_ns, ctime_ns = status.st_mtime_ns & _INT64_MAX, status.st_ctime_ns & _INT64_MAX
                        numbers += (status.st_size, mtime_ns, ctime_ns, status.st_ino & _INT64_MAX)
                    except FileNotFoundError:  # gone since it was listed
                        numbers += (NO_FILE, 0, 0, 0)
                elif not is_wanted(name) or _is_folder(entry):
                    if not name.startswith(".") and _is_folder(entry):
                        subfolders.append(os.fsencode(name))
                    continue
                else:
                    numbers += self.numbers(join(folder, os.fsencode(name)))
                names.append(name)
                if len(names) == _CHUNK:
                    _update(digest, names, numbers)
        _update(digest, names, numbers)
        return digest.digest(), subfolders


def _retried(work: Callable[[bytes], T], path: bytes) -> T:
    """What `work` gives for a path; a passing fault of a network mount is waited out for a moment."""
    for attempt in range(_ATTEMPTS - 1):
        try:
            return work(path)
        except OSError as error:
            if error.errno not in _RETRIED:
                raise
            time.sleep(_PAUSE_SECONDS * 2**attempt)
    return work(path)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself; one bad name must not cost the whole folder
        if error.errno in _RETRIED:
            raise
        return False


def is_wanted(name: str) -> bool:
    """Whether a file of this name is an image or a caption file."""
    suffix = name[name.rfind(".") :]
    return (suffix in _SUFFIXES or suffix.lower() in _SUFFIXES) and name[0] != "."


def file_numbers(entry: Path | os.DirEntry[str]) -> tuple[int, int, int, int]:
    """Size, mtime_ns, ctime_ns and inode, as in `FileStat`."""
    try:
        status = entry.stat()
    except OSError as error:  # a link to nothing or to itself, or gone since it was listed
        if error.errno in _RETRIED:
            raise
        return NO_FILE, 0, 0, 0
    if not stat.S_ISREG(status.st_mode):
        return NO_FILE, 0, 0, 0
    # Inodes of some network file systems, and absurd times, are beyond what SQLite's signed integers hold.
    mtime_ns, ctime_ns = status.st_mtime_ns & _INT64_MAX, status.st_ctime_ns & _INT64_MAX
    return status.st_size, mtime_ns, ctime_ns, status.st_ino & _INT64_MAX


def _update(digest: hashlib.blake2b, names: list[str], numbers: list[int]) -> None:
    """Feed a chunk of a listing to `digest`, and empty it."""
    digest.update("\0".join(names).encode("utf-8", "surrogateescape") + b"\0\0")
    digest.update(array("q", numbers))
    names.clear()
    numbers.clear()
