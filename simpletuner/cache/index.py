"""Which shard of a store holds which key: an SQLite file that only saves time.

It is compared with the shards that are there (name, size, mtime), never believed over them, and made again where it is
missing, damaged or of another version. In a folder that cannot be written a copy in memory takes its place.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sqlite3
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from simpletuner.cache.shards import DamagedShard, Entry, read_entries
from simpletuner.disk import DATABASE_ERRORS, copy_in_memory, is_damage, read_text
from simpletuner.errors import DataError, Problem

INDEX_NAME = "index.sqlite"
_SHARD_NAME = re.compile(r"^shard-[0-9a-f]{32}\.safetensors$")
_SCHEMA_VERSION = 1
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS shards"
    " (id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL)",
    "CREATE TABLE IF NOT EXISTS entries (key TEXT NOT NULL, shard INTEGER NOT NULL, entry TEXT NOT NULL,"
    " PRIMARY KEY (key, shard)) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS entries_by_shard ON entries (shard)",
    # What was found complete, until a shard goes or changes: see `complete`.
    "CREATE TABLE IF NOT EXISTS complete (name TEXT PRIMARY KEY, num_entries INTEGER NOT NULL) WITHOUT ROWID",
    f"PRAGMA user_version = {_SCHEMA_VERSION}",
)
_BUSY_SECONDS = 60.0
_KEYS_PER_QUERY = 500

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def _repaired(
    method: Callable[Concatenate[ShardIndex, _Args], _Result],
) -> Callable[Concatenate[ShardIndex, _Args], _Result]:
    """Where the index turns out to be damaged, make it again from the shards and try once more.

    Raises:
        DataError: it is locked, or there is no room for it: nothing that a new file would fix.
    """

    @functools.wraps(method)
    def run(self: ShardIndex, *args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        try:
            return method(self, *args, **kwargs)
        except DATABASE_ERRORS as error:
            if is_damage(error):
                self.start_again()
                return method(self, *args, **kwargs)
            raise DataError(
                Problem(
                    f"the index of the cache cannot be used: {error}",
                    file=str(self.folder / INDEX_NAME),
                    fix="free some disk space, or end the program that holds it; what was written stays",
                )
            ) from error

    return run


class ShardIndex:
    """The index of one folder. Not for several threads at once: the store holds its lock around each call.

    Attributes:
        is_writable: whether the folder takes the index, and therefore new shards.
        was_rebuilt: all that it says was read from the shards by this process.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.is_writable = True
        self.was_rebuilt = False
        self._database = self._open()

    def close(self) -> None:
        self._database.close()

    def start_again(self) -> None:
        """Throw the index away and make it again from the shards."""
        self.was_rebuilt = True
        self._database.close()
        if self.is_writable:
            (self.folder / INDEX_NAME).unlink(missing_ok=True)
        self._database = self._open()
        self.refresh()

    @_repaired
    def refresh(self) -> list[str]:
        """Bring the index up to date with the folder.

        Returns:
            Names of new or changed shards that are damaged. What the index knew of them stays until `forget`.
        """
        rows = self._database.execute("SELECT name, size, mtime_ns FROM shards")
        known = {name: (size, mtime_ns) for name, size, mtime_ns in rows}
        there = self._scan()
        for name in known.keys() - there.keys():
            self.forget(name)
        return [name for name in sorted(there) if known.get(name) != there[name] and not self.add(name)]

    def add(self, name: str) -> bool:
        """Take up a shard from its header; False if it is damaged. One that has vanished again is no damage."""
        path = self.folder / name
        try:
            stat = path.stat()
            entries = read_entries(path)
        except FileNotFoundError:
            return True
        except DamagedShard:
            return False
        if any(place.end > stat.st_size for entry in entries.values() for place in entry.tensors):
            return False
        self.note(name, stat, entries)
        return True

    @_repaired
    def note(self, name: str, stat: os.stat_result, entries: dict[str, Entry]) -> None:
        """Replace what is known of a shard."""
        with self._database as database:
            _forget(database, name)
            (shard,) = database.execute(
                "INSERT INTO shards (name, size, mtime_ns) VALUES (?, ?, ?) RETURNING id",
                (name, stat.st_size, stat.st_mtime_ns),
            ).fetchone()
            rows = [(key, shard, entry.to_json()) for key, entry in entries.items()]
            database.executemany("INSERT OR REPLACE INTO entries VALUES (?, ?, ?)", rows)

    @_repaired
    def forget(self, name: str) -> None:
        """Drop a shard; what other shards hold of its keys is found there from now on."""
        with self._database as database:
            _forget(database, name)

    @_repaired
    def note_complete(self, name: str, num_entries: int) -> None:
        """Remember that everything called `name` is there, so that nobody has to ask for each key again."""
        with self._database as database:
            database.execute("INSERT OR REPLACE INTO complete VALUES (?, ?)", (name, num_entries))

    @_repaired
    def forget_complete(self) -> None:
        """Nothing is known to be complete any more: the next start asks for each key."""
        with self._database as database:
            database.execute("DELETE FROM complete")

    @_repaired
    def complete(self, name: str) -> int | None:
        """How many entries `note_complete` spoke of; None where it did not, or a shard has gone or changed since."""
        row = self._database.execute("SELECT num_entries FROM complete WHERE name = ?", (name,)).fetchone()
        return row[0] if row else None

    @_repaired
    def find(self, key: str) -> tuple[str, Entry] | None:
        """(shard, entry) of a key. Where two processes have written it, either does: keys tell the content."""
        query = "SELECT name, entry FROM entries JOIN shards ON shards.id = entries.shard WHERE key = ? LIMIT 1"
        row = self._database.execute(query, (key,)).fetchone()
        try:
            return (row[0], Entry.from_json(row[1])) if row else None
        except (ValueError, TypeError) as error:
            raise sqlite3.DatabaseError(f"a damaged entry of {row[0]}") from error

    @_repaired
    def present(self, keys: Iterable[str]) -> set[str]:
        """Those of `keys` that a shard holds."""
        remaining = iter(list(keys))
        found: set[str] = set()
        while chunk := list(islice(remaining, _KEYS_PER_QUERY)):
            marks = ",".join("?" * len(chunk))
            rows = self._database.execute(f"SELECT key FROM entries WHERE key IN ({marks})", chunk)
            found.update(key for (key,) in rows)
        return found

    @_repaired
    def keys(self) -> list[str]:
        return [key for (key,) in self._database.execute("SELECT DISTINCT key FROM entries ORDER BY key")]

    @_repaired
    def shards(self) -> list[str]:
        return [name for (name,) in self._database.execute("SELECT name FROM shards ORDER BY name")]

    @_repaired
    def keys_of(self, name: str) -> list[str]:
        query = "SELECT key FROM entries JOIN shards ON shards.id = entries.shard WHERE name = ? ORDER BY key"
        return [key for (key,) in self._database.execute(query, (name,))]

    @_repaired
    def totals(self) -> tuple[int, int, int]:
        """(keys, shards, bytes of all shards)."""
        (num_keys,) = self._database.execute("SELECT COUNT(DISTINCT key) FROM entries").fetchone()
        query = "SELECT COUNT(*), COALESCE(SUM(size), 0) FROM shards"
        return num_keys, *self._database.execute(query).fetchone()

    def _scan(self) -> dict[str, tuple[int, int]]:
        """Name -> (size, mtime_ns) of the shards that are there; files of other names are not ours."""
        if not self.folder.is_dir():  # it could not be made
            return {}
        there = {}
        with os.scandir(self.folder) as listing:
            for item in listing:
                if _SHARD_NAME.match(item.name):
                    try:
                        stat = item.stat()
                    except FileNotFoundError:  # another process has just removed it
                        continue
                    there[item.name] = (stat.st_size, stat.st_mtime_ns)
        return there

    def _open(self) -> sqlite3.Connection:
        path = self.folder / INDEX_NAME
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return _connect(path)
        except (OSError, *DATABASE_ERRORS) as error:
            if not isinstance(error, OSError) and is_damage(error):
                path.unlink(missing_ok=True)
                return _connect(path)
            self.is_writable = False
            return _copy_in_memory(path)


def _connect(path: Path) -> sqlite3.Connection:
    """Open for writing; what this raises where the file cannot be written is found out now, not at the first shard."""
    database = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
    database.text_factory = read_text
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        if version not in (0, _SCHEMA_VERSION):
            raise sqlite3.DatabaseError(f"index of version {version}")
        return _with_schema(database)
    except DATABASE_ERRORS:
        database.close()
        raise


def _forget(database: sqlite3.Connection, name: str) -> None:
    """Drop what is known of a shard; where anything was, nothing is known to be complete."""
    database.execute("DELETE FROM entries WHERE shard IN (SELECT id FROM shards WHERE name = ?)", (name,))
    if database.execute("DELETE FROM shards WHERE name = ?", (name,)).rowcount:
        database.execute("DELETE FROM complete")


def _copy_in_memory(path: Path) -> sqlite3.Connection:
    """A copy of the index that is there, or an empty one; `refresh` brings either up to date."""
    memory = copy_in_memory(path)
    if memory.execute("PRAGMA user_version").fetchone() == (_SCHEMA_VERSION,):
        with contextlib.suppress(*DATABASE_ERRORS):
            return _with_schema(memory)
    memory.close()
    return _with_schema(sqlite3.connect(":memory:", check_same_thread=False))


def _with_schema(database: sqlite3.Connection) -> sqlite3.Connection:
    with database:
        database.execute("BEGIN IMMEDIATE")  # Python begins none for such statements: each would wait for the disk
        for statement in _SCHEMA:
            database.execute(statement)
    return database
