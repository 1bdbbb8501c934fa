"""TensorBoard files as its own reader reads them, resumed runs included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from simpletuner.reporting.events import EvalDone, ImagesMade, RunStarted, SavedImage, StepDone
from simpletuner.reporting.sinks.tensorboard import TensorBoardSink, folder_name
from tests.events import step_done


def step(number: int, loss: float) -> StepDone:
    return step_done(number, loss=loss, grad_norm=2.0, seconds=0.5, extra={"ema_decay": 0.9})


def test_tensorboard_reads_back_scalars_and_images(tmp_path: Path):
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    sink = TensorBoardSink(tmp_path)
    sink.handle(RunStarted("trial", tmp_path, 10, options={"seed": 42}))
    sink.handle(step(1, 0.75))
    sink.handle(EvalDone(1, {"held-out": 0.5}, 0.5, ((0.25, 0.125),)))
    first = SavedImage(tmp_path / "a.png", "cat", "a cat", 8, 6, 1, "live")
    sink.handle(ImagesMade(1, (first, replace(first, index=1))))
    sink.close()

    read = EventAccumulator(str(tmp_path / "logs" / "trial")).Reload()
    assert {
        tag: read.Scalars(tag)[0].value for tag in ("train/loss", "loss/val/held-out", "loss_by_quantile/0.25")
    } == {
        "train/loss": 0.75,
        "loss/val/held-out": 0.5,
        "loss_by_quantile/0.25": 0.125,
    }
    assert read.Scalars("train/ema_decay")[0].value == pytest.approx(0.9)
    assert read.Scalars("speed/samples_per_second")[0].value == 8.0
    assert (read.Images("live/cat_8x6")[0].width, read.Images("live/cat_8x6")[0].height) == (8, 6)
    assert [len(read.Images(tag)) for tag in ("live/cat_8x6", "live/cat_8x6_1")] == [1, 1], "one does not hide another"


def test_a_resumed_run_supersedes_the_steps_it_trains_again(tmp_path: Path):
    for start, end, loss in ((0, 6, 1.0), (4, 6, 0.5)):
        sink = TensorBoardSink(tmp_path)
        sink.handle(RunStarted("trial", tmp_path, 10, start))
        for number in range(start + 1, end + 1):
            sink.handle(step(number, loss))
        sink.close()
    read = EventAccumulator(str(tmp_path / "logs" / "trial")).Reload()
    assert [(point.step, point.value) for point in read.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 1.0),
        (5, 0.5),
        (6, 0.5),
    ]


def test_a_run_that_begins_again_at_step_0_supersedes_all_of_the_one_before(tmp_path: Path):
    for run_id, end, loss in (("one", 4, 1.0), ("two", 2, 0.5)):
        sink = TensorBoardSink(tmp_path)
        sink.handle(RunStarted("trial", tmp_path, 10, 0, run_id=run_id, branch=f"{run_id}-a"))
        for number in range(1, end + 1):
            sink.handle(step(number, loss))
        sink.close()
    read = EventAccumulator(str(tmp_path / "logs" / "trial")).Reload()
    assert [(point.step, point.value) for point in read.Scalars("train/loss")] == [(1, 0.5), (2, 0.5)]
    text = read.Tensors("run/text_summary")[-1]
    assert text.tensor_proto.string_val == [b"two, branch two-a"]


def test_nothing_is_written_before_the_first_number(tmp_path: Path):
    sink = TensorBoardSink(tmp_path)
    sink.handle(RunStarted("trial", tmp_path, 10))
    sink.close()
    assert not (tmp_path / "logs").exists()


def test_the_name_of_a_run_does_not_lead_out_of_the_folder():
    assert folder_name("group/first run") == "group/first run"
    for name in ("../../x", "/x", "..\\x", "./x/..", "//x//"):
        assert folder_name(name) == "x"
    assert folder_name("..") == "run"


def test_after_a_write_that_the_disk_refused_the_curve_goes_on_and_nothing_is_purged(tmp_path: Path, monkeypatch):
    sink = TensorBoardSink(tmp_path)
    sink.handle(RunStarted("trial", tmp_path, 10, 2))
    for number in (3, 4):
        sink.handle(step(number, 1.0))
    sink.handle(EvalDone(4, {}, 0.5))
    with monkeypatch.context() as patched:
        patched.setattr(RecordWriter, "flush", refuse)
        with pytest.raises(OSError, match="No space left"):
            sink.handle(EvalDone(5, {}, 0.5))
        with pytest.raises(OSError, match="No space left"):
            sink.handle(EvalDone(6, {}, 0.5))
    sink.handle(step(7, 0.25))
    sink.close()
    read = EventAccumulator(str(tmp_path / "logs" / "trial")).Reload()
    assert [point.step for point in read.Scalars("train/loss")] == [3, 4, 7]


def refuse(self) -> None:
    raise OSError(28, "No space left on device")
