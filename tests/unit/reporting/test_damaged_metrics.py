"""A metrics file with damaged records costs those records, and a full disk costs none."""

from __future__ import annotations

import errno
import json
import random

import pytest

from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import (
    CheckpointSaved,
    EvalDone,
    ImagesScored,
    LossBySigma,
    Notice,
    RunFinished,
    RunStarted,
)
from simpletuner.reporting.loss_plot import plot_loss
from simpletuner.reporting.report import write_report
from simpletuner.reporting.sinks.csv_table import CsvSink
from simpletuner.reporting.sinks.jsonl import JsonlSink, read_records, start_from
from tests.events import step_done

DAMAGE = ["text", None, True, [], {}, -1, 1.5, [[1]], "nan", 10**30]


def events(output) -> list:
    return [
        RunStarted("run", output, 4, 0, {"model": "toy"}, {"seed": 1}),
        *(
            step_done(step, total_steps=4, loss=1.0 / step, learning_rate=1e-3, grad_norm=0.5, samples=2)
            for step in (1, 2, 3, 4)
        ),
        EvalDone(2, {"held": 0.5}, 0.5, ((0.1, 0.4),), 1.0, 0.7, ((0.1, 0.9),)),
        LossBySigma(4, 1, ((0.0, 0.1, 0.5, 4),)),
        ImagesScored(4, "clip", {"live/a": 0.3}, 0.3),
        CheckpointSaved(4, output / "checkpoint-4"),
        RunFinished(4, 1.0, {"adapter": output / "a"}, ("x",)),
    ]


def write(output) -> list[dict]:
    sink = JsonlSink(output)
    for event in events(output):
        sink.handle(event)
    sink.close()
    return read_records(sink.path)


@pytest.mark.parametrize("step", ["text", None, True, 1.5, [1], {}])
def test_a_record_whose_step_is_no_number_is_left_out_and_the_run_goes_on(tmp_path, step):
    records = write(tmp_path)
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps(records[3] | {"step": step}) + "\n" + "[" * 100_000 + "\n\xff\xfe\n")
    assert read_records(path) == records
    start_from(path, 2)
    assert [record["step"] for record in read_records(path) if record["event"] == "step_done"] == [1, 2]


@pytest.mark.slow
def test_damaged_values_stop_neither_table_nor_curve_nor_report(tmp_path):
    records = write(tmp_path)
    rng = random.Random(2)
    path = tmp_path / "metrics.jsonl"
    for number in range(60):
        damaged = [dict(record) for record in records]
        for _ in range(rng.randrange(1, 6)):
            record = rng.choice(damaged)
            record[rng.choice(list(record))] = rng.choice(DAMAGE)
        path.write_text("".join(json.dumps(record) + "\n" for record in damaged))
        table = CsvSink(tmp_path)
        table.handle(events(tmp_path)[0])
        table.close()
        if number % 6 == 0:
            plot_loss(path, tmp_path / "loss.png")
        if read_records(path):
            write_report(tmp_path)


def test_a_full_disk_costs_no_line(tmp_path, monkeypatch):
    """The disk takes half of a line, then nothing for a while, then all."""
    sink, reported = JsonlSink(tmp_path), []

    class Listener:
        name, failures = "listener", ()

        def handle(self, event):
            reported.append(event)

        def close(self): ...

    bus = EventBus([sink, Listener()])
    started, *rest = events(tmp_path)
    bus.emit(started)
    file, room = sink._file, [25, 0, 0, 10**6, 10**6, 10**6]

    class Full:
        def write(self, data):
            left = room[0]
            if not left:
                room.pop(0)
                raise OSError(errno.ENOSPC, "No space left on device")
            room[0] = 0 if left < 10**6 else left
            return file.write(bytes(data[:left]))

        def close(self):
            file.close()

    monkeypatch.setattr(sink, "_file", Full())
    for event in rest:
        bus.emit(event)
    bus.close()
    kept = [record["event"] for record in read_records(sink.path)]
    assert [name for name in kept if name != "notice"] == [record["event"] for record in write(tmp_path / "straight")]
    assert len([event for event in reported if isinstance(event, Notice)]) == 1
