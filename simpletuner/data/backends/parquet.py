"""Parquet files that hold images and captions, the form in which Hugging Face datasets are kept and served.

To the index each file is a folder and each row an image, with its caption beside it. A file that did not change is
not opened at a start; a row is read by decoding the row group that it lies in, and the last few are kept, since rows
are read nearly in order. pyarrow does the reading: the `datasets` library would first copy everything to Arrow files.
"""

from __future__ import annotations

import bisect
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.data.backends.base import (
    MAX_FILE_BYTES,
    NOT_READ,
    TOO_LARGE,
    FileStat,
    Folder,
    UnusableFile,
    content_number,
)
from simpletuner.data.backends.local import CAPTION_SUFFIX, file_numbers
from simpletuner.data.tables import CAPTION_COLUMNS, joined
from simpletuner.errors import DataError, MissingDependency, Problem
from simpletuner.text import without_separators

if TYPE_CHECKING:
    import pyarrow as pa

# Row groups of images that are kept decoded; those of the hub have 100 rows.
_KEPT_BYTES = 256 * 2**20
_KEPT_GROUPS = 2
MAX_GROUP_BYTES = 1 << 32
_DIGITS = 9


@dataclass(frozen=True)
class ParquetTable:
    """Which files and columns make up a dataset.

    Args:
        files: name of each file, relative and `/`-separated -> where it is.
        image_column: struct of `bytes` and `path` (as `datasets` writes it), or binary.
        caption_columns: of text or lists of variants, the first that holds text counts; None for the first of
            `CAPTION_COLUMNS` that is there.
        has_captions: False where no caption is asked for.
        location: as the user knows it.
        identity: as in `Backend`.
    """

    files: Mapping[str, Path]
    image_column: str
    caption_columns: tuple[str, ...] | None
    location: str
    identity: str
    has_captions: bool = True


class ParquetBackend:
    """See `Backend`.

    Args:
        dataset_id: named in errors, with the key.
        file: data file that errors name.

    Raises:
        MissingDependency: pyarrow is not installed.
        DataError: a file is damaged, or lacks a column.
    """

    def __init__(self, table: ParquetTable, dataset_id: str, file: str | None = None):
        _require_pyarrow()
        self.location = table.location
        self.num_readers = None
        self._table, self._dataset_id, self._file = table, dataset_id, file
        self._files = {name.encode(): path for name, path in table.files.items()}
        self._lock = threading.Lock()
        self._starts: dict[bytes, list[int]] = {}
        self._groups: OrderedDict[tuple[bytes, int, tuple[str, ...]], pa.Table] = OrderedDict()
        self._caption_columns = self._check_columns()
        self.identity = f"{table.identity} {table.image_column} {' '.join(self._caption_columns)}"

    def folders(self) -> Iterator[Folder]:
        for name, path in sorted(self._files.items()):
            yield Folder(name, b" ".join(b"%d" % number for number in file_numbers(path)))

    def files(self, folder: bytes) -> Iterator[FileStat]:
        # Other rows of a file that was written again may have changed: each image carries the whole file's signature.
        signature = file_numbers(self._files[folder])
        columns = list(self._caption_columns)
        row = 0
        for group in range(len(self._group_starts(folder)) - 1):
            captions = self._load(folder, group, columns) if columns else None
            for offset in range(self._group_starts(folder)[group + 1] - row):
                name = b"%0*d" % (_DIGITS, row + offset)
                yield FileStat(name, *signature)
                caption = _caption(captions, offset) if captions is not None else b""
                if caption:
                    yield FileStat(name + CAPTION_SUFFIX.encode(), len(caption), 0, 0, content_number(caption))
            row = self._group_starts(folder)[group + 1]

    def read(self, path: bytes) -> bytes:
        folder, _, name = path.rpartition(b"/")
        is_caption = name.endswith(CAPTION_SUFFIX.encode())
        row = int(name.removesuffix(CAPTION_SUFFIX.encode()))
        starts = self._group_starts(folder)
        group = bisect.bisect_right(starts, row) - 1
        if group + 1 >= len(starts):
            raise OSError("it is no longer there")
        columns = self._caption_columns if is_caption else (self._table.image_column,)
        rows = self._load(folder, group, columns)
        return _caption(rows, row - starts[group]) if is_caption else _image(rows, row - starts[group])

    def _group_starts(self, folder: bytes) -> list[int]:
        """Row at which each row group begins, and the number of rows at the end."""
        if folder not in self._starts:
            metadata = self._open(folder).metadata
            counts = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            self._starts[folder] = list(accumulate(counts, initial=0))
        return self._starts[folder]

    def _check_group(self, folder: bytes, group: int) -> None:
        num_bytes = self._open(folder).metadata.row_group(group).total_byte_size
        if num_bytes > MAX_GROUP_BYTES:
            message = f"{self._files[folder]} has {num_bytes >> 20} MiB in one row group"
            fix = "write it with smaller ones (row_group_size=100)"
            allowed = f"at most {MAX_GROUP_BYTES >> 20} MiB"
            key = f"{self._dataset_id}.dataset_name"
            raise DataError(Problem(message, key=key, file=self._file, allowed=allowed, fix=fix))

    def _load(self, folder: bytes, group: int, columns: Sequence[str]) -> pa.Table:
        """Columns of one row group, from memory where it was read lately."""
        import pyarrow as pa

        key = (folder, group, tuple(columns))
        with self._lock:
            if key in self._groups:
                self._groups.move_to_end(key)
                return self._groups[key]
            self._check_group(folder, group)
            try:
                rows = self._open(folder).read_row_group(group, columns=list(columns), use_threads=False)
                rows.validate(full=True)  # texts are UTF-8, lists lie within the column
            except (pa.ArrowException, OSError, ValueError) as error:
                raise self._damaged(folder, error) from error
            starts = self._group_starts(folder)
            if rows.num_rows != starts[group + 1] - starts[group]:
                raise OSError("the file changed since the run began")
            self._groups[key] = rows
            while len(self._groups) > _KEPT_GROUPS and sum(kept.nbytes for kept in self._groups.values()) > _KEPT_BYTES:
                self._groups.popitem(last=False)
            return rows

    def _open(self, folder: bytes) -> Any:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        try:
            return ParquetFile(self._files[folder])
        except (pa.ArrowException, OSError, ValueError) as error:
            raise self._damaged(folder, error) from error

    def _check_columns(self) -> tuple[str, ...]:
        """The caption columns; all files are taken to have the columns of the first."""
        name = min(self._files)
        schema = self._open(name).schema_arrow
        kind = schema.field(self._table.image_column).type if self._table.image_column in schema.names else None
        if kind is None or not _holds_images(kind):
            message = f"holds no images in {name.decode()}" if kind else f"is not a column of {name.decode()}"
            raise self._no_column("image_column", self._table.image_column, message, schema)
        if not self._table.has_captions:
            return ()
        wanted = self._table.caption_columns
        if wanted is None:
            wanted = tuple(column for column in CAPTION_COLUMNS if column in schema.names)[:1]
            if not wanted:
                raise self._no_column("caption_column", ", ".join(CAPTION_COLUMNS), "are no columns", schema)
        for column in wanted:
            if column not in schema.names or not _holds_text(schema.field(column).type):
                raise self._no_column("caption_column", column, f"is not a text column of {name.decode()}", schema)
        return wanted

    def _no_column(self, key: str, column: str, message: str, schema: pa.Schema) -> DataError:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        problem = Problem(
            f"{column} {message}", key=f"{self._dataset_id}.{key}", file=self._file, allowed=f"one of {columns}"
        )
        return DataError(problem)

    def _damaged(self, folder: bytes, error: Exception) -> DataError:
        text = " ".join(str(error).split())[:200]
        problem = Problem(
            f"{self._files[folder]} cannot be read: {text}",
            key=f"{self._dataset_id}.dataset_name",
            file=self._file,
            fix="fetch or write this file again",
        )
        return DataError(problem)


def _require_pyarrow() -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        message = "type huggingface needs pyarrow, which is not installed"
        raise MissingDependency(Problem(message, fix="pip install pyarrow")) from None


def _holds_images(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _image(rows: pa.Table, offset: int) -> bytes:
    value = rows.column(0)[offset].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if data and len(data) > MAX_FILE_BYTES:
        raise UnusableFile(NOT_READ[TOO_LARGE])
    if data:
        return data
    if isinstance(value, dict) and value.get("path"):
        raise UnusableFile("the row contains a path and no image; write the table with the images in it")
    raise UnusableFile("the row holds no image")


def _caption(rows: pa.Table, offset: int) -> bytes:
    """The variants of a row's caption, from the first of the columns that holds text."""
    for column in rows.columns:
        value = column[offset].as_py()
        texts = value if isinstance(value, list) else [value]
        cleaned = (without_separators(text).strip() for text in texts if text)
        if variants := [text for text in dict.fromkeys(cleaned) if text]:
            return joined(variants).encode()
    return b""
