"""`loss.png`: which curves it has and what it shows of short, damaged and regularization runs."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from PIL import Image

from simpletuner import storage
from simpletuner.disk import DiskError
from simpletuner.reporting.charts import Axes, Series, nice_ticks, number_text, smoothed, thinned
from simpletuner.reporting.events import EvalDone, RunStarted
from simpletuner.reporting.loss_plot import EVAL, plot_loss, read_curves
from simpletuner.reporting.sinks.jsonl import JsonlSink
from tests.events import step_done


def write_metrics(folder: Path, train: list[float], evaluation: dict[int, float]) -> Path:
    sink = JsonlSink(folder)
    sink.handle(RunStarted("trial", folder, len(train)))
    for number, loss in enumerate(train, start=1):
        sink.handle(step_done(number, total_steps=len(train), loss=loss))
    for number, loss in evaluation.items():
        sink.handle(EvalDone(number, {"a": loss}, loss))
    sink.close()
    return sink.path


def color_columns(image: Image.Image, color: str, below: int) -> list[int]:
    """x of the pixels of one color, beneath the legend."""
    wanted = tuple(int(color[i : i + 2], 16) for i in (1, 3, 5))
    pixels = image.load()
    return [x for x in range(image.width) for y in range(below, image.height) if pixels[x, y] == wanted]


def test_the_eval_curve_spans_the_run_and_falls(tmp_path: Path):
    metrics = write_metrics(tmp_path, [1.0] * 100, {0: 1.0, 50: 0.75, 100: 0.5})
    path = plot_loss(metrics, tmp_path / "loss.png")
    assert path is not None
    with Image.open(path) as image:
        columns = color_columns(image.convert("RGB"), EVAL, below=60)
        assert (image.width, image.height) == (1200, 720)
        # The first and last dots are centered on the ends of the axis.
        assert min(columns) == pytest.approx(96, abs=6)
        assert max(columns) == pytest.approx(1164, abs=6)


def test_a_disk_that_refuses_the_new_curve_leaves_the_old_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    metrics = write_metrics(tmp_path, [1.0] * 3, {0: 1.0})
    before = plot_loss(metrics, tmp_path / "loss.png").read_bytes()

    def refuse(name: str) -> None:
        if name == "rename":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_step", refuse)
    with pytest.raises(DiskError):
        plot_loss(metrics, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"loss.png", metrics.name}


def test_what_a_matplotlibrc_of_the_working_folder_says_counts_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    metrics = write_metrics(tmp_path, [1.0, 0.5], {})
    expected = plot_loss(metrics, tmp_path / "a.png").read_bytes()
    from matplotlib import rcParams

    for key, value in {
        "text.usetex": True,
        "savefig.dpi": 2.0,
        "axes.facecolor": "red",
        "savefig.bbox": "tight",
    }.items():
        monkeypatch.setitem(rcParams, key, value)
    assert plot_loss(metrics, tmp_path / "b.png").read_bytes() == expected
    assert rcParams["text.usetex"] is True, "those of a program that calls this stay as they were"


def test_a_run_without_losses_draws_nothing(tmp_path: Path):
    assert plot_loss(write_metrics(tmp_path, [], {}), tmp_path / "loss.png") is None
    assert not (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("train", [[0.5], [0.5, 0.5], [0.0, 0.0], [float("nan"), 0.5, 0.25]])
def test_short_flat_and_broken_runs_are_drawn(tmp_path: Path, train: list[float]):
    assert plot_loss(write_metrics(tmp_path, train, {0: 0.5}), tmp_path / "loss.png") is not None


def test_steps_on_regularisation_data_have_a_curve_of_their_own(tmp_path: Path):
    sink = JsonlSink(tmp_path)
    sink.handle(step_done(1, total_steps=3, loss=0.75))
    sink.handle(step_done(2, total_steps=3, loss=0.01, extra={"regularisation_loss": 0.01}, is_regularisation=True))
    sink.handle(step_done(3, total_steps=3, extra={"regularisation_loss": 0.02}))
    sink.handle(step_done(4, total_steps=5, loss=0.0, extra={"regularisation_loss": 0.0}))
    sink.close()
    curves = read_curves(sink.path)
    assert curves.train == [(1, 0.75), (3, 0.5), (4, 0.0)]
    assert curves.prior == [(2, 0.01)]


def test_a_file_of_before_the_field_is_read_by_its_losses(tmp_path: Path):
    steps = [(1, 0.75, {}), (2, 0.01, {"regularisation_loss": 0.01}), (3, 0.5, {"regularisation_loss": 0.02})]
    records = [{"event": "step_done", "step": step, "loss": loss, "extra": extra} for step, loss, extra in steps]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    curves = read_curves(tmp_path / "metrics.jsonl")
    assert (curves.train, curves.prior) == ([(1, 0.75), (3, 0.5)], [(2, 0.01)])


def test_smoothing_a_constant_changes_nothing():
    assert [value for _, value in smoothed([(step, 0.3) for step in range(200)])] == pytest.approx([0.3] * 200)


def test_ticks_are_round_and_inside():
    assert nice_ticks(0.13, 1.04, 6) == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert nice_ticks(0, 400, 8) == [0, 50, 100, 150, 200, 250, 300, 350, 400]
    assert nice_ticks(3, 3, 5) == [3]


def test_smoothing_forgets_a_thirtieth_of_the_run_and_begins_with_the_first_value():
    """Of 60 points each counts half: 8, (4 + 8/4) / 3/4, ..."""
    points = [(1.0, 8.0), (2.0, 4.0), (3.0, 0.0), *((float(step), 0.0) for step in range(4, 61))]
    values = [value for _, value in smoothed(points)]
    assert values[:3] == pytest.approx([8, (0.25 * 8 + 0.5 * 4) / 0.75, (0.125 * 8 + 0.25 * 4) / 0.875])
    assert smoothed(points[:3]) == points[:3]  # short runs are shown as they are


def test_thinned_curves_keep_every_peak_in_its_place():
    points = [(float(step), 0.0) for step in range(1000)]
    points[501], points[502] = (501.0, 9.0), (502.0, -9.0)
    kept = thinned(points, 100)
    assert {(501.0, 9.0), (502.0, -9.0)} <= set(kept)
    assert kept == sorted(kept)
    assert len(kept) <= 100
    assert thinned(points[:100], 100) == points[:100]


def test_a_chart_has_room_around_its_curves_and_outliers_of_noise_touch_the_edge():
    """Without a 50th of the noisy points at either end; 6 % of the span above, and never below zero."""
    noise = Series("", [(float(step), 1.0) for step in range(98)] + [(98.0, 50.0), (99.0, 0.5)], style="faint")
    axes = Axes.around([noise, Series("a", [(10.0, 2.0), (20.0, 3.0)])], (200, 100), False)
    assert (axes.left, axes.right) == (0, 99)
    assert (axes.low, axes.high) == pytest.approx((1 - 0.12, 3.12))
    assert (axes.x(0), axes.x(99)) == (58, 200 - 14)
    assert (axes.y(axes.low), axes.y(axes.high), axes.y(50.0)) == pytest.approx((100 - 30, 14, 14))
    flat = Axes.around([Series("a", [(1.0, 0.0), (2.0, 0.02)])], (200, 100), False)
    assert flat.low == 0
    decades = Axes.around([Series("a", [(1.0, 1e-4), (2.0, 1e-2)])], (200, 100), True)
    assert (decades.low, decades.high) == pytest.approx((-4.12, -1.88))
    assert decades.y(1e-3) == pytest.approx((14 + 70) / 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(12000.0, "12,000"), (0.0321, "0.0321"), (0.000123456, "0.00012"), (0.0, "0"), (-2.5, "-2.5"), (1e9, "1e+09")],
)
def test_numbers_on_axes_are_short(value: float, text: str):
    assert number_text(value) == text
