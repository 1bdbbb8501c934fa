"""What is known of every file of a folder, kept in SQLite, so that a start looks only at what changed.

One index serves every dataset that reads the same folder, at whatever resolution. Rows are facts about one state of a
file and are never altered: a file that changes gets a new row and the old one is retired, so a run that began before
the change keeps resolving its samples while another process scans (`scan.py`). The order of images is that of the
bytes of their paths, never the order in which the system lists them.

The usable images are also kept as a few arrays (`Catalog`), from which a start reads a million images at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.backends.base import Backend
from simpletuner.data.captions import caption_from_name, is_camera_name
from simpletuner.data.report import MAX_EXAMPLES, Note, SkippedFiles
from simpletuner.data.scan import CountFiles, has_undecoded, update_files
from simpletuner.disk import DATABASE_ERRORS, copy_in_memory, is_damage, is_writable
from simpletuner.errors import DataError, Problem
from simpletuner.text import forms_of, one_form

# Raised when the tables or the meaning of a column change; an index of another version is made again.
INDEX_VERSION = 3

_BUSY_SECONDS = 120.0
# Of the byte kept of each name: 1 where it has words, and this where they are a camera's.
_CAMERA = 2
_WAIT_SECONDS = 0.5
_QUERY_ROWS = 500

# What reading raises where bits of the file have flipped and SQLite did not notice.
_DAMAGE = (KeyError, TypeError, ValueError, AttributeError, OverflowError)

_TABLES = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS folders (id INTEGER PRIMARY KEY, path BLOB UNIQUE, listing BLOB, error TEXT);
CREATE TABLE IF NOT EXISTS files (
    id INTEGER PRIMARY KEY, live INTEGER, folder INTEGER, path BLOB, stem BLOB, suffix BLOB, is_text INTEGER,
    size INTEGER, mtime_ns INTEGER, ctime_ns INTEGER, inode INTEGER,
    status TEXT, reason TEXT, digest BLOB, height INTEGER, width INTEGER, text TEXT
);
CREATE UNIQUE INDEX IF NOT EXISTS live_paths ON files (path) WHERE live;
CREATE INDEX IF NOT EXISTS live_folders ON files (folder) WHERE live;
CREATE INDEX IF NOT EXISTS live_texts ON files (stem) WHERE live AND is_text;
CREATE INDEX IF NOT EXISTS live_failures ON files (status) WHERE live AND status != 'ok';
CREATE INDEX IF NOT EXISTS live_notes ON files (reason) WHERE live AND status = 'ok' AND reason IS NOT NULL;
CREATE TABLE IF NOT EXISTS catalogue (
    id INTEGER PRIMARY KEY CHECK (id = 0), ids BLOB, texts BLOB, heights BLOB, widths BLOB, named BLOB,
    images_digest TEXT, texts_digest TEXT, duplicates INTEGER
);
CREATE TABLE IF NOT EXISTS undecoded (id INTEGER PRIMARY KEY);
"""

_USABLE_IMAGES = """
SELECT image.id, image.path, image.digest, image.height, image.width, text.id, text.digest
FROM files AS image
LEFT JOIN files AS text ON text.live AND text.is_text AND text.status = 'ok'
    AND text.stem IN (image.stem, CAST(image.stem || image.suffix AS BLOB))
WHERE image.live AND NOT image.is_text AND image.status = 'ok'
ORDER BY image.path, text.stem = image.stem, text.path DESC
"""
# Named, since SQLite would otherwise walk all files to find none that failed.
_FAILURES = "files INDEXED BY live_failures WHERE live AND status != 'ok'"
_NOTED = "files INDEXED BY live_notes WHERE live AND status = 'ok' AND reason IS NOT NULL"
_DISTINCT_CONTENTS = "SELECT count(DISTINCT digest) FROM files WHERE live AND NOT is_text AND status = 'ok'"


@dataclass(frozen=True)
class Catalog:
    """The usable images of a folder in the order of their paths, as arrays of N.

    Args:
        ids: row of each image.
        texts: row of the caption file (`a.png.txt`, else `a.txt`), -1 where there is none.
        heights: pixels, upright.
        widths: pixels, upright.
        is_named: whether the file's name gives a caption.
        is_camera_name: whether that name is one that a camera or a program gave.
        images_digest: changes when a path, a content or the order does.
        texts_digest: changes when a caption file does.
        num_duplicates: images whose bytes an earlier one has too.
    """

    ids: NDArray[np.int64]
    texts: NDArray[np.int64]
    heights: NDArray[np.int32]
    widths: NDArray[np.int32]
    is_named: NDArray[np.bool_]
    is_camera_name: NDArray[np.bool_]
    images_digest: str
    texts_digest: str
    num_duplicates: int

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class ImageRow:
    """What the index knows of one image: path relative to the root, sha256 of the file, upright size in pixels."""

    path: str
    digest: str
    height: int
    width: int


class Index:
    """The index of one folder. Safe to read from several threads.

    Args:
        path: of the SQLite file; made where it is missing. Never inside a user's folder.
        backend: the folder.

    Raises:
        DataError: the file cannot be opened, read or written (from any method).
    """

    def __init__(self, path: Path, backend: Backend):
        self.path = path
        self.backend = backend
        self._lock = threading.Lock()
        # A cache that can only be read serves too: what it knows is taken over, what is new is looked at each time.
        self._is_shared = is_writable(path)
        with self._explained():
            if self._is_shared:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _open(path) if self._is_shared else _open_copy(path)

    def close(self) -> None:
        self._db.close()

    def scan(self, progress: CountFiles | None = None, is_trusted: bool = False, decodes: bool = True) -> Catalog:
        """Look at what is new or changed since the last scan; the usable images after it.

        Of several processes that scan one folder, one does the work and the others wait for it.

        Args:
            progress: called with the number of files looked at so far, also while waiting. What it raises ends the
                scan.
            is_trusted: where there has been a scan, take what it found and do not look at the folder.
            decodes: decode each image. False is for images that are all encoded before training, where what cannot be
                decoded is reported too (`image_facts`).
        """
        with self._lock, self._explained(), self._only_scan(progress):
            try:
                return self._scan(progress, is_trusted, decodes)
            except (sqlite3.DatabaseError, *_DAMAGE) as error:
                if isinstance(error, sqlite3.DatabaseError) and not is_damage(error):
                    raise
                self._start_again()
                return self._scan(progress, False, decodes)

    def _start_again(self) -> None:
        """Make a damaged index again; what its files are is found out again."""
        self._db.close()
        if self._is_shared:
            self.path.unlink(missing_ok=True)
            self.path.with_name(f"{self.path.name}-journal").unlink(missing_ok=True)
            self._db = _open(self.path)
        else:
            self._db = sqlite3.connect(":memory:", check_same_thread=False)
            _make_tables(self._db)

    def _scan(self, progress: CountFiles | None, is_trusted: bool, decodes: bool) -> Catalog:
        # An index from before lacks it, and all of its images were decoded.
        self._db.execute("CREATE TABLE IF NOT EXISTS undecoded (id INTEGER PRIMARY KEY)")
        select = "SELECT * FROM catalogue"
        is_known = is_trusted and self._db.execute(select).fetchone() is not None
        if not is_known or (decodes and has_undecoded(self._db)):
            update_files(self._db, self.backend, progress, decodes)
        stored = self._db.execute(select).fetchone()
        if stored is None:
            catalog = self._build_catalog()
            self._keep(catalog)
            return catalog
        _, ids, texts, heights, widths, named, *rest = stored
        return Catalog(
            np.frombuffer(ids, dtype="<i8"),
            np.frombuffer(texts, dtype="<i8"),
            np.frombuffer(heights, dtype="<i4"),
            np.frombuffer(widths, dtype="<i4"),
            *_names(np.frombuffer(named, dtype=np.uint8)),
            *rest,
        )

    def images(self, ids: Sequence[int]) -> list[ImageRow]:
        """Rows of images, in the order of `ids`."""
        rows = self._select("SELECT id, path, digest, height, width FROM files WHERE id IN", ids)
        with self._explained():
            found = {row[0]: ImageRow(os.fsdecode(row[1]), row[2].hex(), row[3], row[4]) for row in rows}
            return [found[key] for key in ids]

    def images_beside(self, paths: Sequence[bytes]) -> list[list[tuple[int, ImageRow]]]:
        """For each path the usable images, with their rows, that are called so up to the extension."""
        result = []
        # A range of paths, which the index by path finds; what has further dots in its name is left out below.
        query = "SELECT id, path, digest, height, width, stem FROM files WHERE live AND path > ? AND path < ?"
        query += " AND NOT is_text AND status = 'ok' ORDER BY path"
        with self._lock, self._explained():
            for path in paths:
                wanted = os.path.splitext(one_form(path))[0]  # noqa: PTH122 - names are bytes, Path is text
                rows: list[tuple[Any, ...]] = []
                for stem in forms_of(wanted):
                    rows += self._db.execute(query, [stem + b".", stem + b"/"])
                result.append(
                    [(r[0], ImageRow(os.fsdecode(r[1]), r[2].hex(), r[3], r[4])) for r in rows if r[5] == wanted]
                )
        return result

    def texts(self, ids: Sequence[int]) -> list[str | None]:
        """Content of caption files, in the order of `ids`; None for -1."""
        rows = self._select("SELECT id, text FROM files WHERE id IN", sorted({key for key in ids if key >= 0}))
        found = {row[0]: row[1] for row in rows}
        return [found.get(key) for key in ids]

    def sizes(self, ids: Sequence[int] | NDArray[np.int64]) -> set[tuple[int, int]]:
        """The different (height, width) of images, in pixels."""
        found: set[tuple[int, int]] = set()
        for start in range(0, len(ids), _QUERY_ROWS):
            part = [int(key) for key in ids[start : start + _QUERY_ROWS]]
            found.update(self._select("SELECT DISTINCT height, width FROM files WHERE id IN", part))
        return found

    def paths(self, ids: Sequence[int] | NDArray[np.int64]) -> Iterator[str]:
        """The path of each row, in the order of `ids`, a part at a time."""
        for start in range(0, len(ids), _QUERY_ROWS):
            part = [int(key) for key in ids[start : start + _QUERY_ROWS]]
            found = dict(self._select("SELECT id, path FROM files WHERE id IN", part))
            yield from (os.fsdecode(found[key]) for key in part)

    def image_paths(self) -> Iterator[bytes]:
        """The path of each image, usable or not, in order; the lock is held for a part at a time."""
        last = b""
        query = f"SELECT path FROM files WHERE live AND NOT is_text AND path > ? ORDER BY path LIMIT {_QUERY_ROWS}"
        while True:
            with self._lock, self._explained():
                part = [path for (path,) in self._db.execute(query, [last])]
            if not part:
                return
            yield from part
            last = part[-1]

    def skipped(self, with_texts: bool = False) -> SkippedFiles:
        """The images and folders that cannot be used; caption files too where asked."""
        result = SkippedFiles()
        for path, reason in self._failures(with_texts):
            result.add_many(reason, 1, [path])
        result.listings.append(lambda: self._failures(with_texts))
        return result

    def _failures(self, with_texts: bool) -> Iterator[tuple[str, str]]:
        """(path, reason), folders first, in the order of their paths; the lock is held for a part at a time."""
        with self._lock, self._explained():
            query = "SELECT path, error FROM folders WHERE error IS NOT NULL ORDER BY path"
            folders = self._db.execute(query).fetchall()
            kind = "" if with_texts else " AND NOT is_text"
            ids = array("q", (key for (key,) in self._db.execute(f"SELECT id FROM {_FAILURES}{kind} ORDER BY path")))
        yield from ((os.fsdecode(path) or ".", f"folder: {error}") for path, error in folders)
        for start in range(0, len(ids), _QUERY_ROWS):
            part = ids[start : start + _QUERY_ROWS]
            rows = self._select("SELECT id, path, is_text, reason FROM files WHERE id IN", part)
            found = {key: (os.fsdecode(path), is_text, reason) for key, path, is_text, reason in rows}
            for path, is_text, reason in (found[key] for key in part):
                yield path, f"caption file: {reason}" if is_text else reason

    def notes(self, of_texts: bool = False) -> dict[str, Note]:
        """What is odd about images, or about caption files, that are used all the same."""
        kind = f" AND {'' if of_texts else 'NOT '}is_text"
        with self._lock, self._explained():
            query = f"SELECT reason, count(*) FROM {_NOTED}{kind} GROUP BY reason ORDER BY reason"
            counts = self._db.execute(query).fetchall()
            notes = {}
            for text, count in counts:
                query = f"SELECT path FROM {_NOTED}{kind} AND reason = ? ORDER BY path LIMIT {MAX_EXAMPLES}"
                paths = [os.fsdecode(path) for (path,) in self._db.execute(query, [text])]
                notes[text] = Note(count, tuple(paths))
        return notes

    def num_images(self) -> int:
        """Images found, usable or not."""
        with self._lock, self._explained():
            usable = self._db.execute("SELECT length(ids) / 8 FROM catalogue").fetchone()
            failed = self._db.execute(f"SELECT count(*) FROM {_FAILURES} AND NOT is_text")
            return (usable[0] if usable else 0) + failed.fetchone()[0]

    def _select(self, query: str, ids: Sequence[int]) -> list[tuple[Any, ...]]:
        rows: list[tuple[Any, ...]] = []
        with self._lock, self._explained():
            for start in range(0, len(ids), _QUERY_ROWS):
                part = [int(key) for key in ids[start : start + _QUERY_ROWS]]
                rows += self._db.execute(f"{query} ({','.join('?' * len(part))})", part).fetchall()
        return rows

    def _build_catalog(self) -> Catalog:
        ids, texts, heights, widths, named = array("q"), array("q"), array("i"), array("i"), bytearray()
        images, captions = hashlib.sha256(), hashlib.sha256()
        last = None
        for key, path, digest, height, width, text, text_digest in self._db.execute(_USABLE_IMAGES):
            if key == last:  # a.png.txt, a.txt, a.caption: the first one counts
                continue
            last = key
            ids.append(key)
            texts.append(-1 if text is None else text)
            heights.append(height)
            widths.append(width)
            name = os.fsdecode(path)
            named.append(bool(caption_from_name(name)) + _CAMERA * is_camera_name(name))
            images.update(b"%d %d %d %b%b" % (len(path), height, width, digest, path))
            captions.update(text_digest or bytes(32))
        return Catalog(
            np.array(ids, dtype="<i8"),
            np.array(texts, dtype="<i8"),
            np.array(heights, dtype="<i4"),
            np.array(widths, dtype="<i4"),
            *_names(np.array(named, dtype=np.uint8)),
            images.hexdigest(),
            captions.hexdigest(),
            len(ids) - self._db.execute(_DISTINCT_CONTENTS).fetchone()[0],
        )

    def _keep(self, catalog: Catalog) -> None:
        named = catalog.is_named + _CAMERA * catalog.is_camera_name.astype(np.uint8)
        arrays = (catalog.ids, catalog.texts, catalog.heights, catalog.widths, named)
        with self._db:
            self._db.execute(
                "INSERT OR REPLACE INTO catalogue VALUES (0, ?, ?, ?, ?, ?, ?, ?, ?)",
                [
                    *(values.tobytes() for values in arrays),
                    catalog.images_digest,
                    catalog.texts_digest,
                    catalog.num_duplicates,
                ],
            )

    @contextlib.contextmanager
    def _only_scan(self, progress: CountFiles | None) -> Iterator[None]:
        from filelock import FileLock, Timeout

        if not self._is_shared:  # a copy in memory is this process's own
            yield
            return
        lock = FileLock(f"{self.path}.lock")
        while not lock.is_locked:
            try:
                lock.acquire(timeout=_WAIT_SECONDS)
            except Timeout:
                if progress:
                    progress(0)
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Failures of the index file as errors for the user."""
        try:
            yield
        except (sqlite3.Error, OSError, *_DAMAGE) as error:
            raise DataError(
                Problem(
                    f"the index of {self.backend.location} at {self.path} cannot be used: {error}",
                    fix="free some disk space and make the folder writable; the index may be removed, it is made again",
                )
            ) from error


def _names(kinds: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(has words, is a camera's) of the names of files, from the byte that is kept of each."""
    return (kinds & 1).astype(np.bool_), (kinds & _CAMERA).astype(np.bool_)


def _open(path: Path) -> sqlite3.Connection:
    """An index of this version at `path`. One that is damaged or of another version is replaced: nothing is lost."""
    database = _connect(path)
    try:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version == INDEX_VERSION:
            return database
        if version == 0:
            _make_tables(database)
            return database
    except DATABASE_ERRORS as error:
        if not is_damage(error):
            raise
    database.close()
    path.unlink()
    database = _connect(path)
    _make_tables(database)
    return database


def _open_copy(path: Path) -> sqlite3.Connection:
    """The index at `path` in memory, for a folder that can only be read; an empty one where it is of no use."""
    database = copy_in_memory(path)
    if database.execute("PRAGMA user_version").fetchone()[0] != INDEX_VERSION:
        database.close()
        database = sqlite3.connect(":memory:", check_same_thread=False)
        _make_tables(database)
    return database


def _connect(path: Path) -> sqlite3.Connection:
    # One connection, guarded by the index's lock; samples are read from prefetch threads too.
    database = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
    database.execute("PRAGMA temp_store = FILE")
    return database


def _make_tables(database: sqlite3.Connection) -> None:
    database.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {INDEX_VERSION}; COMMIT;")
