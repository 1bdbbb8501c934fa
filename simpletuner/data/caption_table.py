"""Captions in a table beside the pictures: `metadata.csv`, `.jsonl` or `.parquet` with a row per picture.

The table is read once for each content of the file and kept as SQLite, so that a million captions need no memory. A row
belongs to the picture at its path, written with or without the extension; several rows of one picture, and lists in a
cell, are variants.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.captions import VARIANT_SEPARATOR
from simpletuner.data.index import Catalogue, Index
from simpletuner.errors import DataError, MissingDependency, Problem

# Raise it when the same table would be kept in another way.
_VERSION = 1
CAPTION_COLUMNS = ("text", "caption", "prompt")
_QUERY_ROWS = 500

Row = dict[str, Any]


class CaptionTable:
    """The captions of one table. Safe to read from several threads.

    Args:
        table: the file; its extension says what it is.
        folder: where the SQLite file is kept.
        filename_column: holds the paths.
        caption_columns: of these the first that holds text counts; None for the first of `CAPTION_COLUMNS` there is.
        key: names the table in errors: dataset id and key.
        data_file: named in errors.

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
    ):
        self.table = table
        self._filename_column = filename_column
        self._caption_columns = caption_columns
        self._key, self._data_file = key, data_file
        self._lock = threading.Lock()
        self.digest = self._file_digest()
        path = folder / f"captions-{self.digest[:32]}.sqlite"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                self._build(path)
            self._db = sqlite3.connect(path, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise self._fault(f"cannot be kept at {path}: {error}") from error

    def take(self, paths: Sequence[str]) -> list[str | None]:
        """The captions of each picture in one text, variants apart by U+001E; None where there is no row."""
        found: dict[bytes, str] = {}
        names = [os.fsencode(path) for path in paths]
        wanted = list(dict.fromkeys([*names, *(_stem(name) for name in names)]))
        with self._lock:
            for start in range(0, len(wanted), _QUERY_ROWS):
                part = wanted[start : start + _QUERY_ROWS]
                marks = ",".join("?" * len(part))
                rows = self._db.execute(f"SELECT path, text FROM captions WHERE path IN ({marks}) ORDER BY rowid", part)
                for path, text in rows:
                    found[path] = f"{found[path]}{VARIANT_SEPARATOR}{text}" if path in found else text
        return [found.get(name, found.get(_stem(name))) for name in names]

    def without_caption(self, positions: NDArray[np.int64], catalogue: Catalogue, index: Index) -> NDArray[np.int64]:
        """Of the pictures at `positions` of a catalogue, those that have no row."""
        missing: list[int] = []
        for start in range(0, len(positions), _QUERY_ROWS):
            part = positions[start : start + _QUERY_ROWS]
            paths = [row.path for row in index.pictures(catalogue.ids[part].tolist())]
            missing += [int(place) for place, text in zip(part, self.take(paths), strict=True) if text is None]
        return np.array(missing, dtype=np.int64)

    def _file_digest(self) -> str:
        settings = json.dumps([_VERSION, self.table.suffix, self._filename_column, self._caption_columns])
        digest = hashlib.sha256(settings.encode())
        try:
            with self.table.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
        except OSError as error:
            raise self._fault(f"cannot be read: {error.strerror or error}") from error
        return digest.hexdigest()

    def _build(self, path: Path) -> None:
        """Write beside, then rename: a table is there whole or not at all, and of two processes one wins."""
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.unlink(missing_ok=True)
        try:
            with contextlib.closing(sqlite3.connect(partial)) as database, database:
                database.execute("CREATE TABLE captions (path BLOB, text TEXT)")
                database.executemany("INSERT INTO captions VALUES (?, ?)", self._captions())
                database.execute("CREATE INDEX paths ON captions (path)")
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _captions(self) -> Iterator[tuple[bytes, str]]:
        columns: Sequence[str] | None = None
        try:
            for row in self._rows():
                if columns is None:
                    columns = self._columns_of(row)
                name, caption = _text(row.get(self._filename_column)), ""
                for column in columns:
                    caption = caption or _variants(row.get(column))
                if name and caption:
                    yield os.fsencode(name.replace("\\", "/").removeprefix("./")), caption
        except (OSError, UnicodeDecodeError, csv.Error, ValueError) as error:
            raise self._fault(f"cannot be read: {error}") from error

    def _rows(self) -> Iterable[Row]:
        suffix = self.table.suffix.lower()
        if suffix == ".parquet":
            return _parquet_rows(self.table)
        return _csv_rows(self.table) if suffix == ".csv" else _jsonl_rows(self.table)

    def _columns_of(self, row: Row) -> Sequence[str]:
        """The caption columns, checked on the first row."""
        there = ", ".join(str(name) for name in row)
        if self._filename_column not in row:
            message = f'has no column "{self._filename_column}"'
            raise self._fault(message, "filename_column", f"one of its columns: {there}")
        columns = [name for name in self._caption_columns or CAPTION_COLUMNS if name in row]
        missing = [name for name in self._caption_columns or () if name not in row]
        if missing or not columns:
            message = f"has no column {' or '.join(missing or CAPTION_COLUMNS)}"
            raise self._fault(message, "caption_column", f"one of its columns: {there}")
        return columns if self._caption_columns else columns[:1]

    def _fault(self, message: str, key: str = "metadata_file", allowed: str | None = None) -> DataError:
        return DataError(Problem(f"{self.table} {message}", f"{self._key}.{key}", self._data_file, allowed=allowed))


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, strict=True)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from None
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not an object")
                yield row


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingDependency(Problem("captions in parquet files need pyarrow", fix="pip install pyarrow")) from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                yield from batch.to_pylist()
    except arrow.ArrowException as error:
        raise ValueError(str(error)) from error


def _text(value: Any) -> str:
    """A cell as text; numbers are names too."""
    return "" if value is None else str(value).strip()


def _variants(value: Any) -> str:
    """A cell, or each part of a list, joined; empty where there is no text."""
    parts = value if isinstance(value, list | tuple) else [value]
    return VARIANT_SEPARATOR.join(text for part in parts if (text := _text(part)))


def _stem(name: bytes) -> bytes:
    return os.path.splitext(name)[0]  # noqa: PTH122 - names are bytes, Path is text
