"""Messages for what the operating system refuses: any error of a disk becomes one message with exit code 3.

Which errors a disk can give is no short list (full, over quota, a stale mount, too many open files, a folder that is
gone), so every errno is reported; only what a network connection raises is left to its caller.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

from simpletuner.errors import DataError, Problem
from simpletuner.tempnames import parse_name

_FREE_SPACE = "free some space, then start again: what was committed before is untouched"
_OTHER_FOLDER = "choose another folder, or make this one writable"
_LOOK = "check the disk and its mount, then start again: what was committed before is untouched"
_MESSAGES = {
    errno.ENOSPC: ("the disk is full", _FREE_SPACE),
    errno.EDQUOT: ("the disk quota is used up", _FREE_SPACE),
    errno.EROFS: ("the file system is read-only", _OTHER_FOLDER),
    errno.EACCES: ("permission denied", _OTHER_FOLDER),
    errno.EPERM: ("the operation is not permitted", _OTHER_FOLDER),
    errno.EIO: ("the disk reports an error", _LOOK),
    errno.ENOENT: ("the file or its folder is gone", "see what removed it; a folder must stay while a run uses it"),
    errno.EMFILE: ("too many files are open", "raise the limit in this shell: ulimit -n 65536"),
    errno.ENFILE: ("too many files are open on this machine", "end other programs, or raise fs.file-max"),
    errno.EFBIG: ("the file would be too large", "raise the limit (ulimit -f), or choose another file system"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter output_dir"),
}
# What may be over in a while, at the same place.
_PASSING = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN))

# What a file system answers that does not support what it is asked for.
_UNSUPPORTED = frozenset((errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EPERM))

# What a database raises; a message with the name of a damaged table is no text.
DATABASE_ERRORS = (sqlite3.DatabaseError, UnicodeDecodeError)
_DAMAGED_CONTENT = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_MISMATCH)


class DiskError(DataError):
    """A disk refused something.

    Args:
        number: the errno; None where a library kept it to itself.
    """

    def __init__(self, problem: Problem, number: int | None):
        super().__init__(problem)
        self.number = number

    @property
    def may_pass(self) -> bool:
        """Whether the same may work later: space can be freed, and a mount can come back."""
        return self.number in _PASSING


def disk_error(error: BaseException, place: Path | None = None, what: str = "used") -> DiskError | None:
    """What an exception tells of a disk, for the user; None where it is about something else.

    Args:
        place: what was worked on; None: what the exception names.
        what: could not be done with it: `written`.
    """
    if isinstance(error, sqlite3.DatabaseError):
        message = f"a database of the cache cannot be used: {error}"
        fix = "free some space on its disk and make its folder writable; it may be removed, and is then made again"
        return DiskError(Problem(message, file=str(place) if place else None, key="cache_dir", fix=fix), None)
    number = errno_of(error)
    if number is None:
        return None
    message, fix = _MESSAGES.get(number, (os.strerror(number).lower(), _LOOK))
    named = place or getattr(error, "filename", None)
    file = os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) else None
    return DiskError(Problem(f"cannot be {what}: {message}", file=file, fix=fix), number)


@contextlib.contextmanager
def where_supported() -> Iterator[None]:
    """Go on where a file system does not support what is inside, on which nothing depends that counts: permissions
    (exFAT, shares of Windows), or that a folder is written at once (some network mounts)."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def is_damage(error: Exception) -> bool:
    """Whether the content of a database is at fault, so that it must be made again; else it is locked, its disk full or
    its folder read-only. A flipped bit in the name of a table looks like a mistake of the query."""
    if not isinstance(error, sqlite3.OperationalError):
        return True
    return getattr(error, "sqlite_errorcode", None) in _DAMAGED_CONTENT


def errno_of(error: BaseException) -> int | None:
    """The errno of a disk; None for errors of connections and for what is no error of the system at all."""
    if isinstance(error, OSError):
        is_network = isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] in ("ssl", "socket")
        return None if is_network else error.errno
    # safetensors gives it as text only: `... (os error 28)`.
    match = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(match.group(1)) if match else None


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what the disk refuses while `path` is written into a DiskError; everything else passes."""
    try:
        yield
    except Exception as error:
        place = getattr(error, "filename", None)
        is_elsewhere = isinstance(place, str | bytes) and not Path(os.fsdecode(place)).is_relative_to(path.parent)
        # Inside of a folder that is being written, `commit_dir` tells it with the name that the user knows.
        is_inside = any(parse_name(part) for part in path.parts)
        reported = None if is_elsewhere or is_inside else disk_error(error, path, "written")
        if reported is None:
            raise
        raise reported from error


@contextlib.contextmanager
def reported_as_disk_errors() -> Iterator[None]:
    """Turn whatever a disk refuses in the block, wherever that is, into a DiskError."""
    try:
        yield
    except Exception as error:
        reported = disk_error(error)
        if reported is None:
            raise
        raise reported from error


def is_writable(path: Path) -> bool:
    """Whether a file can be made or changed: its disk and its folder, or the folder above where that is missing."""
    if path.exists() and not os.access(path, os.W_OK):
        return False
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


def read_text(data: bytes) -> str:
    """What a database holds as text, for `text_factory`: bytes that a flipped bit has made no text are no error here,
    but something that nothing fits."""
    return data.decode("utf-8", "replace")


def copy_in_memory(path: Path) -> sqlite3.Connection:
    """A database in memory with the content of a file that can only be read; empty where there is none, or a damaged
    one."""
    memory = sqlite3.connect(":memory:", check_same_thread=False)
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(path))}?mode=ro&immutable=1", uri=True)) as source:
            source.backup(memory)
        memory.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except DATABASE_ERRORS:
        memory.close()
        memory = sqlite3.connect(":memory:", check_same_thread=False)
    return memory
