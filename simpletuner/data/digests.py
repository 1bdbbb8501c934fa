"""Digests of files, remembered, so that unchanged files are not read again at each start.

A digest is remembered under (device, inode, size, mtime_ns, ctime_ns) of its file and read again when any of them
differs; so is one of a version that did not seal what it remembered. The memory is an SQLite file that may be deleted
at any time.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
import time
from pathlib import Path

from simpletuner.disk import DATABASE_ERRORS, is_damage, read_text
from simpletuner.storage import file_digest

_SCHEMA = """
CREATE TABLE IF NOT EXISTS digests (
    device INTEGER, inode INTEGER, size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, digest TEXT NOT NULL,
    PRIMARY KEY (device, inode)
) WITHOUT ROWID
"""
_COMMIT_ENTRIES = 512
_SEAL_LENGTH = 16
_BUSY_SECONDS = 60.0
# A file changed within the tick of its own time stamp looks unchanged: what is younger is not remembered.
_FINE_TICK_SECONDS = 0.05
_COARSE_TICK_SECONDS = 2.0


class DigestMemo:
    """sha256 of files, remembered in `sqlite_path`. Safe to use from several threads and processes.

    Where `sqlite_path` cannot be written the memory lasts as long as the object.
    """

    def __init__(self, sqlite_path: str | Path):
        self._path = Path(sqlite_path)
        self._lock = threading.Lock()
        self._pending: dict[tuple[int, int], tuple[int, int, int, str]] = {}
        self._database = _open_database(self._path)

    def __enter__(self) -> DigestMemo:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Save what is not saved yet, and close."""
        with self._lock:
            self._save()
            self._database.close()

    def digest(self, path: str | Path) -> str:
        """sha256 of the file's bytes in hex, symbolic links followed.

        Raises:
            OSError: the file cannot be read.
        """
        before = Path(path).stat()
        known = self._recall(before)
        if known is not None:
            return known
        digest = file_digest(path)
        after = Path(path).stat()
        if _identity(before) == _identity(after) and _has_settled(after):
            self._remember(after, digest)
        return digest

    def _recall(self, stat: os.stat_result) -> str | None:
        key, wanted = (stat.st_dev, stat.st_ino), (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        with self._lock:
            row = self._pending.get(key) or self._select(key)
        if row is None or tuple(row[:3]) != wanted:
            return None
        digest = str(row[3])[:-_SEAL_LENGTH]
        return digest if row[3] == _sealed(wanted, digest) else None

    def _select(self, key: tuple[int, int]) -> tuple[int, int, int, str] | None:
        query = "SELECT size, mtime_ns, ctime_ns, digest FROM digests WHERE device = ? AND inode = ?"
        try:
            return self._database.execute(query, tuple(map(_signed, key))).fetchone()
        except DATABASE_ERRORS as error:
            self._start_again(error)
            return None

    def _remember(self, stat: os.stat_result, digest: str) -> None:
        with self._lock:
            numbers = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            self._pending[(stat.st_dev, stat.st_ino)] = (*numbers, _sealed(numbers, digest))
            if len(self._pending) >= _COMMIT_ENTRIES:
                self._save()

    def _save(self) -> None:
        rows = [(_signed(dev), _signed(ino), *value) for (dev, ino), value in self._pending.items()]
        try:
            with self._database:
                self._database.executemany("INSERT OR REPLACE INTO digests VALUES (?, ?, ?, ?, ?, ?)", rows)
        except DATABASE_ERRORS as error:
            self._start_again(error)
        self._pending.clear()

    def _start_again(self, error: Exception) -> None:
        """Go on in memory: digests can always be computed again. A damaged file is removed, a full disk's one stays."""
        self._database.close()
        if is_damage(error):
            self._path.unlink(missing_ok=True)
        self._database = _connect(":memory:")


def _open_database(path: Path) -> sqlite3.Connection:
    """The database at `path`: made again where it is damaged, in memory where its folder cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return _connect(str(path))
    except (OSError, *DATABASE_ERRORS) as error:
        if not isinstance(error, OSError) and is_damage(error):
            path.unlink(missing_ok=True)
            return _connect(str(path))
        return _connect(":memory:")


def _connect(place: str) -> sqlite3.Connection:
    database = sqlite3.connect(place, timeout=_BUSY_SECONDS, check_same_thread=False)
    database.text_factory = read_text
    try:
        with database:
            database.execute(_SCHEMA)
            # A write that changes nothing: a read-only file is found out here, not when the first digest is saved.
            database.execute("DELETE FROM digests WHERE inode IS NULL")
    except DATABASE_ERRORS:
        database.close()
        raise
    return database


def _sealed(numbers: tuple[int, ...], digest: str) -> str:
    """A digest with what shows that neither it nor the numbers of its file have changed on the disk: a wrong one would
    look like another model, and everything would be encoded again."""
    return digest + hashlib.sha256(f"{numbers} {digest}".encode()).hexdigest()[:_SEAL_LENGTH]


def _identity(stat: os.stat_result) -> tuple[int, int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _has_settled(stat: os.stat_result) -> bool:
    """Whether the file is older than the tick of its time stamps; whole seconds are a sign of coarse ones."""
    tick = _COARSE_TICK_SECONDS if stat.st_mtime_ns % 1_000_000_000 == 0 else _FINE_TICK_SECONDS
    return time.time() - max(stat.st_mtime, stat.st_ctime) > tick


def _signed(number: int) -> int:
    """SQLite's integers are signed 64 bit; inodes of some network file systems use the top bit."""
    return number - (1 << 64) if number >= 1 << 63 else number
