"""`metrics.jsonl`: a killed run keeps its steps, a resumed run has none twice, runs do not mix."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

from simpletuner.reporting.events import EvalDone, Notice, PhaseProgress, RunFinished, RunStarted, StepDone
from simpletuner.reporting.loss_plot import read_curves
from simpletuner.reporting.sinks.jsonl import JsonlSink, read_records
from tests.events import step_done


def step(number: int, loss: float) -> StepDone:
    return step_done(number, loss=loss)


def write_run(folder: Path, start: int, end: int, loss: float) -> None:
    """A run that is killed after step `end`: its sink is never closed."""
    sink = JsonlSink(folder)
    sink.handle(Notice("info", "before the start"))
    sink.handle(RunStarted("run", folder, 10, start))
    for number in range(start + 1, end + 1):
        sink.handle(step(number, loss))
        if number % 2 == 0:
            sink.handle(EvalDone(number, {"held-out": loss}, loss))


def test_a_killed_run_keeps_every_step_it_made(tmp_path: Path):
    write_run(tmp_path, 0, 5, 1.0)
    assert [step for step, _ in read_curves(tmp_path / "metrics.jsonl").train] == [1, 2, 3, 4, 5]


def test_a_resumed_run_has_no_step_twice_and_keeps_the_earlier_ones(tmp_path: Path):
    write_run(tmp_path, 0, 7, 1.0)
    write_run(tmp_path, 4, 6, 0.5)
    records = read_records(tmp_path / "metrics.jsonl")
    steps = [(r["step"], r["loss"]) for r in records if r["event"] == "step_done"]
    assert steps == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 0.5), (6, 0.5)]
    assert [r["step"] for r in records if r["event"] == "eval_done"] == [2, 4, 6]


def test_a_new_run_sets_an_older_file_aside(tmp_path: Path):
    write_run(tmp_path, 0, 3, 1.0)
    write_run(tmp_path, 0, 1, 0.5)
    write_run(tmp_path, 0, 2, 0.25)
    assert [loss for _, loss in read_curves(tmp_path / "metrics.jsonl").train] == [0.25, 0.25]
    assert [loss for _, loss in read_curves(tmp_path / "metrics.1.jsonl").train] == [1.0, 1.0, 1.0]
    assert [loss for _, loss in read_curves(tmp_path / "metrics.2.jsonl").train] == [0.5]


def test_what_came_before_the_start_is_in_the_file_of_the_run(tmp_path: Path):
    write_run(tmp_path, 0, 1, 1.0)
    events = [record["event"] for record in read_records(tmp_path / "metrics.jsonl")]
    assert events == ["notice", "run_started", "step_done"]
    assert not (tmp_path / "metrics.1.jsonl").exists()


def fail_before_the_start(folder: Path) -> None:
    sink = JsonlSink(folder)
    sink.handle(Notice("error", "no images"))
    sink.close()


def test_a_start_that_is_refused_changes_nothing_in_the_record_of_the_run_that_is_there(tmp_path: Path):
    write_run(tmp_path, 0, 2, 1.0)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    fail_before_the_start(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_the_reasons_of_starts_that_failed_stay_in_front_of_the_run_that_follows(tmp_path: Path):
    fail_before_the_start(tmp_path)
    fail_before_the_start(tmp_path)
    write_run(tmp_path, 0, 2, 1.0)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["text"] for record in records[:2]] == ["no images", "no images"]
    assert len(read_curves(tmp_path / "metrics.jsonl").train) == 2
    assert not (tmp_path / "metrics.1.jsonl").exists()


def test_a_line_that_was_cut_short_is_left_out(tmp_path: Path):
    write_run(tmp_path, 0, 2, 1.0)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"event": "step_done", "step": 3, "lo')
    write_run(tmp_path, 2, 3, 0.5)
    assert [step for step, _ in read_curves(path).train] == [1, 2, 3]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_cut_line_of_a_start_that_failed_costs_no_line_of_the_run_that_follows(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "notice", "te')
    write_run(tmp_path, 0, 1, 1.0)
    assert [record["event"] for record in read_records(path)] == ["notice", "run_started", "step_done"]


def test_a_name_that_is_no_text_is_kept_by_a_run_that_goes_on(tmp_path: Path):
    """As Python gives a file name that is not UTF-8: with a half surrogate."""
    sink = JsonlSink(tmp_path)
    sink.handle(RunStarted("run", tmp_path, 10, 0))
    sink.handle(Notice("warning", "images/\udcff.png is damaged"))
    write_run(tmp_path, 2, 3, 1.0)
    records = read_records(tmp_path / "metrics.jsonl")
    assert [record["text"] for record in records if record["event"] == "notice"] == [
        "images/\udcff.png is damaged",
        "before the start",
    ]


def test_a_disk_that_refuses_the_start_of_a_resumed_run_costs_no_later_line(tmp_path: Path, monkeypatch):
    write_run(tmp_path, 0, 4, 1.0)
    path, sink = tmp_path / "metrics.jsonl", JsonlSink(tmp_path)
    before = path.read_bytes()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        sink.handle(RunStarted("run", tmp_path, 10, 2))
        sink.handle(step(3, 0.5))
    assert path.read_bytes() == before
    assert len(sink.take_notices()) == 1
    sink.handle(step(4, 0.5))
    assert [loss for _, loss in read_curves(path).train] == [1.0, 1.0, 0.5, 0.5]
    assert {each.name for each in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_progress_of_phases_is_not_kept(tmp_path: Path):
    sink = JsonlSink(tmp_path)
    sink.handle(PhaseProgress("encoding images", 3))
    sink.close()
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_a_disk_takes_in_pieces_is_written_whole(tmp_path):
    class Slow:
        """Takes five bytes at a time, as a pipe or a disk that is nearly full may."""

        def __init__(self) -> None:
            self.taken = b""

        def write(self, data: bytes) -> int:
            self.taken += bytes(data[:5])
            return min(len(data), 5)

    sink, file = JsonlSink(tmp_path), Slow()
    sink.handle(Notice("info", "a text that is longer than five bytes"))
    waiting = bytes(sink._waiting)
    sink._flush(file)
    assert file.taken == waiting
    assert not sink._waiting


def test_an_end_that_is_reported_again_is_in_the_record_once(tmp_path: Path):
    """A kill after the end was recorded and before its report was written: the next start ends once more."""
    for start, is_complete in ((0, False), (2, False), (2, True)):
        sink = JsonlSink(tmp_path)
        sink.handle(RunStarted("run", tmp_path, 2, start, is_complete=is_complete))
        for number in range(start + 1, 3):
            sink.handle(step(number, 1.0))
        if not is_complete:
            sink.handle(RunFinished(2, 1.0))
        sink.close()
        records = read_records(tmp_path / "metrics.jsonl")
        assert [record["step"] for record in records if record["event"] == "run_finished"] == [2]
        assert [record["step"] for record in records if record["event"] == "step_done"] == [1, 2]
    write_run(tmp_path, 2, 3, 1.0)  # it was asked for more steps
    assert "run_finished" not in [record["event"] for record in read_records(tmp_path / "metrics.jsonl")]


def test_a_folder_that_was_renamed_before_the_first_step_is_not_made_again(tmp_path: Path):
    (tmp_path / "output").mkdir()
    sink = JsonlSink(tmp_path / "output")
    sink.handle(Notice("error", "why it failed"))
    (tmp_path / "output").rename(tmp_path / "renamed")
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["renamed"]
