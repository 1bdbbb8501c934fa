"""`metrics.csv`: a row for each optimizer step with all its numbers, for spreadsheets and data frames.

`metrics.jsonl` is the record; this table is made of it. A resumed run makes the table again from the records that
were kept, so it has no step twice and no hole. A column never moves: numbers that come later (an eval loss, a score)
stand behind the known ones, and the rows before them stay empty there.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from simpletuner import storage
from simpletuner.errors import DataError
from simpletuner.reporting.events import Event, RunStarted
from simpletuner.reporting.scalars import record_scalars, scalars
from simpletuner.reporting.sinks.jsonl import METRICS_FILE, read_records

CSV_FILE = "metrics.csv"
FIRST_COLUMNS = (
    *("step", "train/loss", "train/learning_rate", "train/grad_norm", "train/epoch"),
    *("speed/seconds_per_step", "speed/samples_per_second", "memory/gb", "loss/val/pooled"),
)

CsvRow = dict[str, float]


class CsvSink:
    """Keeps the numbers of each step as a row.

    Args:
        output_dir: folder of the run; the table is `metrics.csv` in it, its source `metrics.jsonl`, whose sink has to
            come first.
    """

    name = CSV_FILE
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, output_dir: Path):
        self.path = Path(output_dir) / CSV_FILE
        self._columns: list[str] = []
        self._file: IO[str] | None = None
        self._has_run = False
        self._row: CsvRow = {}
        self._row_start = 0

    def handle(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._has_run = True
            self._begin()
        elif self._has_run and (numbers := scalars(event)):
            self._add({"step": event.step, **numbers})  # type: ignore[attr-defined]

    def close(self) -> None:
        if self._has_run and self._file is None:  # the disk has refused a row, and may take all of them now
            self._begin()
        self._close_file()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _begin(self) -> None:
        """The table of what `metrics.jsonl` still holds, open for more."""
        rows = rows_of(read_records(self.path.with_name(METRICS_FILE)))
        self._columns = list(dict.fromkeys([*FIRST_COLUMNS, *(name for row in rows for name in row)]))
        self._rewrite(rows)

    def _add(self, numbers: CsvRow) -> None:
        """A new row, or more numbers of the last one's step, which is then written once more over itself.

        Where the disk refuses it, the whole table is made again by the next one: half a row may be in the file.
        """
        if self._file is None:
            self._begin()
            return
        try:
            self._write(self._file, numbers)
        except (OSError, DataError):
            with contextlib.suppress(OSError):
                self._close_file()
            raise

    def _write(self, file: IO[str], numbers: CsvRow) -> None:
        if numbers["step"] == self._row.get("step"):
            self._row |= numbers
            file.seek(self._row_start)
            file.truncate()
        else:
            self._row = numbers
        new = [name for name in self._row if name not in self._columns]
        if new:
            rows = read_rows(self.path)
            self._columns += new
            self._rewrite([*rows, self._row])
            return
        self._row_start = file.tell()
        csv.DictWriter(file, self._columns).writerow(self._row)
        file.flush()

    def _rewrite(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """All rows under the present columns; the last one may still be added to."""
        self._close_file()
        with storage.replacing_file(self.path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="")
            writer.writeheader()
            self._row_start = file.tell()
            for row in rows:
                self._row_start = file.tell()
                self._row = {name: value for name, value in row.items() if value != ""}
                writer.writerow(row)
        self._file = self.path.open("r+", encoding="utf-8", newline="")
        self._file.seek(0, 2)


def rows_of(records: Iterable[Mapping[str, Any]]) -> list[CsvRow]:
    """The rows of a metrics file, in order of their steps as they were recorded."""
    rows: dict[int, CsvRow] = {}
    for record in records:
        if numbers := record_scalars(record):
            rows.setdefault(int(record["step"]), {"step": int(record["step"])}).update(numbers)
    return list(rows.values())


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
