"""`metrics.csv`: one row per step, and a resumed run has each step once."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from simpletuner.errors import DataError
from simpletuner.reporting.events import EvalDone, ImagesScored, RunStarted, StepDone
from simpletuner.reporting.sinks.csv_table import FIRST_COLUMNS, CsvSink
from simpletuner.reporting.sinks.jsonl import JsonlSink
from tests.events import step_done


def step(number: int, loss: float, **extra: float) -> StepDone:
    return step_done(number, loss=loss, seconds=0.5, extra=extra)


class Run:
    """Both sinks, as a run has them; never closed, as after a kill."""

    def __init__(self, folder: Path, start: int = 0):
        self.sinks = [JsonlSink(folder), CsvSink(folder)]
        self.emit(RunStarted("run", folder, 10, start))

    def emit(self, *events) -> None:
        for event in events:
            for sink in self.sinks:
                sink.handle(event)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_step_is_one_row_with_its_evaluation_and_its_scores(tmp_path: Path):
    run = Run(tmp_path)
    run.emit(EvalDone(0, {}, 2.0), step(1, 1.0), step(2, 0.5), EvalDone(2, {"held": 0.25}, 0.25))
    run.emit(ImagesScored(2, "clip", {"live/cat": 0.3}, 0.3), step(3, 0.4))
    read = rows(tmp_path)
    assert [row["step"] for row in read] == ["0", "1", "2", "3"]
    assert [row["train/loss"] for row in read] == ["", "1.0", "0.5", "0.4"]
    assert [row["loss/val/pooled"] for row in read] == ["2.0", "", "0.25", ""]
    assert [row["clip/mean"] for row in read] == ["", "", "0.3", ""]
    assert read[2]["speed/samples_per_second"] == "8.0"


def test_columns_keep_their_places_when_new_ones_come(tmp_path: Path):
    run = Run(tmp_path)
    run.emit(step(1, 1.0))
    before = list(rows(tmp_path)[0])
    run.emit(step(2, 1.0, ema_decay=0.5), step(3, 1.0))
    after = rows(tmp_path)
    assert before == list(FIRST_COLUMNS)
    assert list(after[0]) == [*before, "train/ema_decay"]
    assert [row["train/ema_decay"] for row in after] == ["", "0.5", ""]


def test_a_killed_and_resumed_run_has_each_step_once_and_without_a_hole(tmp_path: Path):
    Run(tmp_path).emit(step(1, 1.0), step(2, 1.0, ema_decay=0.1), step(3, 1.0), step(4, 1.0))
    Run(tmp_path, start=2).emit(step(3, 0.5), step(4, 0.5))
    assert [(row["step"], row["train/loss"]) for row in rows(tmp_path)] == [
        ("1", "1.0"),
        ("2", "1.0"),
        ("3", "0.5"),
        ("4", "0.5"),
    ]


def test_a_new_run_does_not_mix_with_an_older_one(tmp_path: Path):
    Run(tmp_path).emit(step(1, 1.0), step(2, 1.0))
    Run(tmp_path).emit(step(1, 0.5))
    assert [row["train/loss"] for row in rows(tmp_path)] == ["0.5"]


def test_numbers_that_come_later_stand_in_the_row_of_their_step_without_a_new_column(tmp_path: Path):
    run = Run(tmp_path)
    for number in (1, 2, 3):
        run.emit(step(number, 1.0 / number), EvalDone(number, {}, number / 4))
    read = rows(tmp_path)
    assert [row["step"] for row in read] == ["1", "2", "3"]
    assert [float(row["train/loss"]) for row in read] == [1.0, 0.5, 1 / 3]
    assert [row["loss/val/pooled"] for row in read] == ["0.25", "0.5", "0.75"]


@pytest.mark.parametrize("tries", [1, 3])
def test_after_a_row_that_the_disk_refused_the_table_is_whole_again(tmp_path: Path, monkeypatch, tries: int):
    """Half a row may be in the file: the whole table is made of the record, also by the end of the run alone."""
    run = Run(tmp_path)
    run.emit(step(1, 1.0), step(2, 0.5))

    def refuse(self, row):
        self.writer.writerow(["9", "half"])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(csv.DictWriter, "writerow", refuse)
        for number in range(3, 3 + tries):
            with pytest.raises((OSError, DataError)):
                run.emit(step(number, 0.25))
    assert len(rows(tmp_path)) <= 2 + tries
    if tries == 1:
        run.emit(step(4, 0.125))
    run.sinks[1].close()
    expected = ["1.0", "0.5", "0.25", "0.125"] if tries == 1 else ["1.0", "0.5", "0.25", "0.25", "0.25"]
    assert [row["train/loss"] for row in rows(tmp_path)] == expected
