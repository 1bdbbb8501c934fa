"""Rows of a table that a user wrote: CSV, JSON lines or Parquet, read one at a time, each with its place in the file.

A row that says less or more than its table can hold is an error that names its line: a caption that is cut, or made of
something that is not text, would be trained without anybody seeing it.
"""

from __future__ import annotations

import contextlib
import csv
import math
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from simpletuner.data.captions import VARIANT_SEPARATOR
from simpletuner.errors import MissingDependency, Problem
from simpletuner.text import NotText, bounded_lines, check_encoding, fault_in, read_json_text, without_separators

# Of one line of a text table, in characters: many times the longest caption.
MAX_LINE = 10_000_000
# Of the text in one cell, which no text encoder reads.
MAX_CELL = 1_000_000
# Of all captions of a million images: many times over.
MAX_TEXT_TABLE = 1 << 32
# Where captions are looked for, unless a dataset names its columns.
CAPTION_COLUMNS = ("text", "caption", "prompt")
_PARQUET = b"PAR1"


_KINDS = {
    **{bool: "a truth value", int: "a number", float: "a number", dict: "an object", list: "a list", bytes: "bytes"}
}


class TableFault(ValueError):
    """What is wrong with a table; `str` of it names the line or row."""


@dataclass(frozen=True)
class TableRow:
    """One row.

    Args:
        place: `line 7` of a text, `row 7` of a Parquet file, counted from 1 without the header.
        cells: column -> value.
    """

    place: str
    cells: Mapping[str, Any]

    def name(self, column: str) -> str:
        """The file that the row is about; empty where it names none.

        Raises:
            TableFault: it is neither text nor a whole number.
        """
        value = self.cells.get(column)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._text(column, value)

    def captions(self, columns: Sequence[str]) -> list[str]:
        """The variants in the first of the columns that holds text.

        Raises:
            TableFault: a cell is neither text nor a list of texts.
        """
        for column in columns:
            value = self.cells.get(column)
            parts = value if isinstance(value, list | tuple) else [value]
            texts = [without_separators(self._text(column, part)).strip() for part in parts]
            if found := list(dict.fromkeys(filter(None, texts))):
                return found
        return []

    def _text(self, column: str, value: Any) -> str:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return ""
        if not isinstance(value, str):
            raise TableFault(f'{self.place}: "{column}" is {_KINDS.get(type(value), "something else")} and no text')
        if len(value) > MAX_CELL:
            raise TableFault(f'{self.place}: "{column}" has more than {MAX_CELL:,} characters')
        if fault := fault_in(value):
            raise TableFault(f'{self.place}: "{column}" {fault}')
        return value.strip()


def joined(variants: Sequence[str]) -> str:
    """Variants in one text, as `captions_of` takes them apart."""
    return VARIANT_SEPARATOR.join(variants)


def check_file(table: Path) -> None:
    """Look at size and kind of a table before all of it is read.

    Raises:
        TableFault: it is not a file, a text of an absurd size, or no Parquet file under that name.
        OSError: it cannot be read.
    """
    status = table.stat()
    if not stat.S_ISREG(status.st_mode):
        raise TableFault("not a regular file")
    if table.suffix.lower() == ".parquet":
        with table.open("rb") as file:
            start = file.read(4)
            file.seek(max(status.st_size - 4, 0))
            if start != _PARQUET or file.read(4) != _PARQUET:
                raise TableFault("not a Parquet file, or cut short")
    elif status.st_size > MAX_TEXT_TABLE:
        raise TableFault(f"larger than {MAX_TEXT_TABLE >> 20} MiB")


def columns_of(table: Path) -> list[str]:
    """The columns of a table; of JSON lines the keys of the first row. Empty where there is no row.

    Raises:
        TableFault, OSError, MissingDependency: as `read_rows`.
    """
    check_file(table)
    try:
        if table.suffix.lower() == ".parquet":
            with _opened_parquet(table) as file:
                names = list(file.schema_arrow.names)
                _refuse_twins(names, "it")
                return names
        if table.suffix.lower() == ".jsonl":
            return list(next((row.cells for row in _jsonl_rows(table)), ()))
        with table.open(encoding=check_encoding(table), newline="") as file:
            return _header(next(_csv_reader(table, file), []))
    except csv.Error as error:
        raise TableFault(f"line 1: {error}") from None
    except NotText as error:
        raise TableFault(str(error)) from None


def read_rows(table: Path, columns: Collection[str]) -> Iterator[TableRow]:
    """The rows of a table; its extension says what it is.

    Args:
        columns: the others need not be read.

    Raises:
        TableFault: it cannot be read as such; the line is named.
        OSError: it cannot be read.
        MissingDependency: a Parquet file, and pyarrow is not installed.
    """
    suffix = table.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet_rows(table, columns)
        return
    try:
        yield from _jsonl_rows(table) if suffix == ".jsonl" else _csv_rows(table)
    except NotText as error:
        raise TableFault(str(error)) from None


def _csv_reader(table: Path, file: IO[str]) -> Any:
    delimiter = "\t" if table.suffix.lower() == ".tsv" else ","
    return csv.reader(bounded_lines(file, MAX_LINE), delimiter=delimiter, strict=True)


def _csv_rows(table: Path) -> Iterator[TableRow]:
    """Blank lines are no rows."""
    with table.open(encoding=check_encoding(table), newline="") as file:
        rows = _csv_reader(table, file)
        header: list[str] | None = None
        start = 1
        try:
            for cells in rows:
                if header is None:
                    header = _header(cells)
                elif len(cells) > len(header):
                    what = f"line {start} has {len(cells)} cells for {len(header)} columns"
                    raise TableFault(f"{what}: put a text that holds the separator between double quotes")
                elif cells:
                    yield TableRow(f"line {start}", dict(zip(header, cells, strict=False)))
                start = rows.line_num + 1
        except csv.Error as error:
            raise TableFault(f"line {start}: {error}") from None


def _header(cells: Sequence[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    _refuse_twins(names, "line 1")
    return names


def _refuse_twins(names: Sequence[str], place: str) -> None:
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise TableFault(f'{place} names the column "{twice}" twice')


def _jsonl_rows(table: Path) -> Iterator[TableRow]:
    with table.open(encoding=check_encoding(table)) as file:
        for number, line in enumerate(bounded_lines(file, MAX_LINE), 1):
            if not line.strip():
                continue
            try:
                row = read_json_text(line, finite=False, object_pairs_hook=_unique_keys)
            except TableFault as error:
                raise TableFault(f"line {number} {error}") from None
            except ValueError as error:
                raise TableFault(f"line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise TableFault(f"line {number} is not an object")
            yield TableRow(f"line {number}", row)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise TableFault(f'gives "{twice}" twice')
    return found


@contextlib.contextmanager
def _opened_parquet(table: Path) -> Iterator[Any]:
    try:
        import pyarrow as arrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise MissingDependency(Problem("captions in parquet files need pyarrow", fix="pip install pyarrow")) from None
    try:
        with parquet.ParquetFile(table) as file:
            yield file
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise TableFault(" ".join(str(error).split())[:200]) from None


def _parquet_rows(table: Path, columns: Collection[str]) -> Iterator[TableRow]:
    number = 0
    with _opened_parquet(table) as file:
        for batch in file.iter_batches(batch_size=1024, columns=list(columns)):
            for cells in batch.to_pylist():
                number += 1
                yield TableRow(f"row {number}", cells)
