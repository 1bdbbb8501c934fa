"""Captions in a table beside the images: `metadata.csv`, `.jsonl` or `.parquet` with a row per image.

The table is read once for each content of the file and kept as SQLite, so that a million captions need no memory. A row
belongs to the image at its path, written with or without the extension; several rows of one image, and lists in a
cell, are variants.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.captions import VARIANT_SEPARATOR
from simpletuner.data.index import Catalog, Index
from simpletuner.data.report import MAX_EXAMPLES, SkippedFiles
from simpletuner.data.tables import CAPTION_COLUMNS, TableFault, check_file, columns_of, joined, read_rows
from simpletuner.errors import DataError, Problem
from simpletuner.text import one_form

# Raise the first when the same table would be kept in another way, the second when it would give other captions.
_FORM, _VERSION = 3, 1
_QUERY_ROWS = 500
_BUSY_SECONDS = 60.0


class CaptionTable:
    """The captions of one table. Safe to read from several threads.

    Args:
        table: the file; its extension says what it is.
        folder: where the SQLite file is kept.
        filename_column: holds the paths.
        caption_columns: of these the first that holds text counts; None for the first of `CAPTION_COLUMNS` there is.
        key: names the table in errors: dataset id and key.
        data_file: named in errors.
        column_key: the key of the dataset that names the columns.

    Raises:
        DataError: the table cannot be read, or lacks a column.
        MissingDependency: a parquet file, and pyarrow is not installed.
    """

    def __init__(
        self,
        table: Path,
        folder: Path,
        filename_column: str,
        caption_columns: Sequence[str] | None,
        key: str,
        data_file: str | None = None,
        column_key: str = "caption_column",
    ):
        self.table = table
        self._filename_column = filename_column
        self._caption_columns = caption_columns
        self._key, self._data_file, self._column_key = key, data_file, column_key
        self._lock = threading.Lock()
        self.digest = self._file_digest()
        path = folder / f"captions-{self.digest[:32]}-{_FORM}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                self._build(path)
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise self._fault(f"cannot be kept at {path}: {error}") from error

    def take(self, paths: Sequence[str]) -> list[str | None]:
        """The captions of each image in one text, variants apart by U+001E; None where there is no row."""
        found: dict[bytes, str] = {}
        names = [one_form(os.fsencode(path)) for path in paths]
        wanted = list(dict.fromkeys([*names, *(_stem(name) for name in names)]))
        with self._lock:
            for start in range(0, len(wanted), _QUERY_ROWS):
                part = wanted[start : start + _QUERY_ROWS]
                marks = ",".join("?" * len(part))
                rows = self._db.execute(
                    f"SELECT path, text FROM captions WHERE path IN ({marks}) AND text != '' ORDER BY rowid", part
                )
                for path, text in rows:
                    found[path] = f"{found[path]}{VARIANT_SEPARATOR}{text}" if path in found else text
        return [found.get(name, found.get(_stem(name))) for name in names]

    def without_caption(self, positions: NDArray[np.int64], catalog: Catalog, index: Index) -> NDArray[np.int64]:
        """Of the images at `positions` of a catalog, those that have no row."""
        missing: list[int] = []
        for start in range(0, len(positions), _QUERY_ROWS):
            part = positions[start : start + _QUERY_ROWS]
            paths = [row.path for row in index.images(catalog.ids[part].tolist())]
            missing += [int(place) for place, text in zip(part, self.take(paths), strict=True) if text is None]
        return np.array(missing, dtype=np.int64)

    def report_unused(self, catalog: Catalog, index: Index, skipped: SkippedFiles) -> None:
        """Count the rows that belong to no image of a folder, usable or not. What is found is kept with the table."""
        key = [f"{catalog.images_digest} {index.num_images()}"]
        with self._lock:
            if not self._db.execute("SELECT 1 FROM unused WHERE images = ?", key).fetchone():
                try:
                    self._find_unused(index, key)
                except sqlite3.OperationalError:  # of a folder that is only read: looked for again at each start
                    self._db.execute("CREATE TEMP TABLE unused (images TEXT, path BLOB, place TEXT)")
                    self._find_unused(index, key)
            query = "FROM unused WHERE images = ? AND place IS NOT NULL"
            count = self._db.execute(f"SELECT count(*) {query}", key).fetchone()[0]
            first = self._db.execute(f"SELECT path, place {query} LIMIT {MAX_EXAMPLES}", key).fetchall()
        reason = f"a row of {self.table.name} without an image of its name"
        names = [_row_name(path, place) for path, place in first]

        def listing() -> Iterator[tuple[str, str]]:
            with self._lock:
                rows = self._db.execute(f"SELECT path, place {query}", key).fetchall()
            yield from ((_row_name(path, place), reason) for path, place in rows)

        skipped.add_many(reason, count, names, listing)

    def _find_unused(self, index: Index, key: list[str]) -> None:
        with self._db:
            self._db.execute("CREATE TEMP TABLE IF NOT EXISTS there (path BLOB PRIMARY KEY) WITHOUT ROWID")
            paths = map(one_form, index.image_paths())
            names = ((name,) for path in paths for name in (path, _stem(path)))
            self._db.executemany("INSERT OR IGNORE INTO there VALUES (?)", names)
            self._db.execute("DELETE FROM unused")
            self._db.execute("INSERT INTO unused VALUES (?, NULL, NULL)", key)  # they were looked for
            self._db.execute(
                "INSERT INTO unused SELECT ?, path, place FROM captions WHERE path NOT IN (SELECT path FROM there)",
                key,
            )
            self._db.execute("DROP TABLE there")

    def _file_digest(self) -> str:
        settings = json.dumps([_VERSION, self.table.suffix, self._filename_column, self._caption_columns])
        digest = hashlib.sha256(settings.encode())
        try:
            check_file(self.table)
            with self.table.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
        except OSError as error:
            raise self._fault(f"cannot be read: {error.strerror or error}") from error
        except TableFault as error:
            raise self._fault(f"cannot be read: {error}") from error
        return digest.hexdigest()

    def _build(self, path: Path) -> None:
        """Write beside, then rename: a table is there whole or not at all, and of two processes one wins."""
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(partial)) as database, database:
                database.execute("CREATE TABLE captions (path BLOB, text TEXT, place TEXT)")
                database.executemany("INSERT INTO captions VALUES (?, ?, ?)", self._captions())
                database.execute("CREATE INDEX paths ON captions (path)")
                database.execute("CREATE TABLE unused (images TEXT, path BLOB, place TEXT)")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _captions(self) -> Iterator[tuple[bytes, str, str]]:
        try:
            columns = self._columns()
            for row in read_rows(self.table, {self._filename_column, *columns}):
                name = row.name(self._filename_column).replace("\\", "/").removeprefix("./")
                yield one_form(os.fsencode(name)), joined(row.captions(columns)), row.place
        except (OSError, TableFault) as error:
            raise self._fault(f"cannot be read: {error}") from error

    def _columns(self) -> Sequence[str]:
        """The caption columns that are there."""
        known = columns_of(self.table)
        there = ", ".join(known)
        if not known:
            raise self._fault("holds no rows")
        if self._filename_column not in known:
            message = f'has no column "{self._filename_column}"'
            raise self._fault(message, "filename_column", f"one of its columns: {there}")
        columns = [name for name in self._caption_columns or CAPTION_COLUMNS if name in known]
        missing = [name for name in self._caption_columns or () if name not in known]
        if missing or not columns:
            message = f"has no column {' or '.join(missing or CAPTION_COLUMNS)}"
            raise self._fault(message, self._column_key, f"one of its columns: {there}")
        return columns if self._caption_columns else columns[:1]

    def _fault(self, message: str, key: str = "metadata_file", allowed: str | None = None) -> DataError:
        return DataError(Problem(f"{self.table} {message}", f"{self._key}.{key}", self._data_file, allowed=allowed))


def _row_name(path: bytes, place: str) -> str:
    return f"{os.fsdecode(path) or 'without a name'} ({place})"


def _stem(name: bytes) -> bytes:
    return os.path.splitext(name)[0]  # noqa: PTH122 - names are bytes, Path is text
