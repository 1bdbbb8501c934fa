"""`metrics.jsonl`: one JSON object per event, appended and flushed, so that a killed run keeps its curve.

A resumed run draws the steps after its checkpoint again; their old records are dropped first, so no step is in the file
twice. A run that starts at step 0 beside an older file sets that file aside and never mixes the two.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from simpletuner import storage
from simpletuner.errors import DataError
from simpletuner.reporting.events import Event, Notice, PhaseProgress, RunStarted, is_sound, to_record
from simpletuner.text import read_json_text

METRICS_FILE = "metrics.jsonl"
MOST_WAITING_BYTES = 64 << 20


class JsonlSink:
    """Keeps all events but the progress of phases.

    Args:
        output_dir: folder of the run; the file is `metrics.jsonl` in it.
    """

    name = METRICS_FILE
    failures: tuple[type[Exception], ...] = (OSError,)

    def __init__(self, output_dir: Path):
        self.path = Path(output_dir) / METRICS_FILE
        self._file: IO[bytes] | None = None
        # Where the run starts is known only after its data is looked at: until then lines wait here. So do those that a
        # full disk does not take.
        self._waiting = bytearray()
        self._start_step: int | None = None
        self._is_complete = False
        self._notices: list[Notice] = []
        self._is_refused = False

    def handle(self, event: Event) -> None:
        if isinstance(event, PhaseProgress):
            return
        self._waiting += _line({"time": round(time.time(), 6), **to_record(event)})
        if isinstance(event, RunStarted):
            self._close_file()
            self._start_step, self._is_complete = event.start_step, event.is_complete
        if self._start_step is not None:
            self._try_to_flush()

    def take_notices(self) -> list[Notice]:
        taken, self._notices = self._notices, []
        return taken

    def close(self) -> None:
        """Write what still waits: a run that failed before it started leaves its reasons in the file.

        Not in that of a run that already exists: a start that was refused is no part of it. Nor in a folder that was
        renamed or deleted meanwhile, whose place stays free.
        """
        is_wanted = self._start_step is not None or not has_run(self.path)
        if self._waiting and is_wanted and self.path.parent.is_dir():
            self._flush(self._file or self._open())
        self._close_file()

    def _open(self) -> IO[bytes]:
        if self._start_step is not None:
            start_from(self.path, self._start_step, self._is_complete)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("ab", buffering=0)
        if not _ends_with_a_line(self.path):  # a crash cut the last one short
            self._waiting[:0] = b"\n"
        return self._file

    def _flush(self, file: IO[bytes]) -> None:
        """Write what waits; what the disk has taken when it refuses more is not written again."""
        while self._waiting:
            del self._waiting[: file.write(self._waiting)]

    def _try_to_flush(self) -> None:
        """Write what waits, or keep it for the next event: a disk that is full now may have room later.

        Raises:
            OSError: so much waits that memory is no place for it.
        """
        try:
            self._flush(self._file or self._open())
        except (OSError, DataError) as error:
            if len(self._waiting) > MOST_WAITING_BYTES:
                raise
            if not self._is_refused:
                reason = error.strerror if isinstance(error, OSError) else error.problems[0].message
                text = f"{self.path} cannot be written ({reason}): its records wait in memory"
                self._notices.append(Notice("warning", text))
            self._is_refused = True
        else:
            self._is_refused = False

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read_records(path: Path) -> list[dict[str, Any]]:
    """All sound records of a metrics file, in order: a line that a crash cut short, or whose values are not of
    their event's kinds, is left out."""
    if not path.is_file():
        return []
    records = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = read_json_text(line)
            except ValueError:
                continue
            if isinstance(record, dict) and is_sound(record):
                records.append(record)
    return records


def has_run(path: Path) -> bool:
    """Whether a run has begun in a metrics file: a start that failed before leaves its reasons alone."""
    return any(record.get("event") == "run_started" for record in read_records(path))


def start_from(path: Path, start_step: int, is_complete: bool = False) -> None:
    """Leave only what a resumed run after `start_step` will not write again: its end too, unless it is complete.

    At step 0 the whole old file is another run's, if one has begun in it: it is renamed to the next free
    `metrics.<n>.jsonl`.
    """
    if not path.is_file():
        return
    if start_step == 0:
        if has_run(path):
            path.rename(_free_name(path))
        return

    def is_kept(record: Mapping[str, Any]) -> bool:
        step, is_end = record.get("step", 0), record.get("event") == "run_finished"
        return bool(step < start_step or (step == start_step and (is_complete or not is_end)))

    storage.write_bytes(path, b"".join(_line(record) for record in read_records(path) if is_kept(record)))


def _line(record: Mapping[str, Any]) -> bytes:
    """Names of files need not be text: what of them is none is escaped."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _ends_with_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return candidate
