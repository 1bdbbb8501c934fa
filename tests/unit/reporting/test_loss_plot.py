"""`loss.png`: which curves it has and what it shows of short, damaged and regularization runs."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image

from simpletuner import storage
from simpletuner.disk import DiskError
from simpletuner.reporting.charts import (
    Axes,
    Series,
    chart,
    legend,
    loss_series,
    nice_ticks,
    number_text,
    smoothed,
    thinned,
)
from simpletuner.reporting.events import EvalDone, RunStarted
from simpletuner.reporting.loss_plot import EVAL, _eval_label, plot_loss, read_curves
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


@pytest.mark.slow
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


def test_the_curves_of_a_loss_have_their_names_and_the_base_a_line_over_all_steps():
    train, evaluation = [(1.0, 2.0), (2.0, 1.0)], [(1.0, 0.5), (2.0, 0.25)]
    found = loss_series(train, [(2.0, 3.0)], evaluation, 0.75, 9.0)
    assert found == [
        Series("each step", train, 1, "faint"),
        Series("training loss, smoothed", train, 1, "line"),
        Series("distance from the base model", [(2.0, 3.0)], 3, "line"),
        Series("eval loss", evaluation, 2, "dots"),
        Series("eval loss of the base model", [(0.0, 0.75), (9.0, 0.75)], 2, "dashed"),
    ]
    assert len(loss_series(train, [], evaluation, None, 9.0)) == 4
    assert len(loss_series(train, [], evaluation[:1], 0.75, 9.0)) == 4
    named = [each.label for each in legend([*found, Series("", train), Series("none", [])])]
    assert named == [each.label for each in found[1:]]


def test_a_chart_by_hand():
    """100 to 200 on 500 pixels: a label about every 90; 0 to 4 on 156 pixels of height."""
    line = Series("loss", [(100.0, 0.0), (200.0, 4.0)], 3)
    svg = chart("of a <run>", [line, Series("", [(150.0, 2.0)], 2, "dots"), Series("empty", [])], "step", (500, 200))
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label") == "of a <run>: loss"
    assert (root.get("viewBox"), root.get("data-first"), root.get("data-last")) == ("0 0 500 200", "100.0", "200.0")
    assert (root.get("data-left"), root.get("data-right")) == ("58", "486")
    # Up to 4.24: 6 % above. 1 and 2 stand 156 / 4.24 pixels apart.
    heights = {tick: f"{170 - 156 * tick / 4.24:.1f}" for tick in (0, 1, 2, 3, 4)}
    grid = [each.get("y1") for each in root.iter() if each.get("class") == "grid"]
    assert grid == list(heights.values())
    [curve] = [each for each in root.iter() if each.tag.endswith("polyline")]
    assert (curve.get("class"), curve.get("points")) == ("c3 line", f"58.0,170.0 486.0,{heights[4]}")
    circles = [each for each in root.iter() if each.tag.endswith("circle")]
    assert [each.get("class") for each in circles] == ["c3 touch", "c3 touch", "c2 dot"]
    assert [each[0].text for each in circles] == ["loss at 100: 0", "loss at 200: 4", " at 150: 2"]
    texts = [each.text for each in root.iter() if each.tag.endswith("text")]
    assert texts == ["0", "1", "2", "3", "4", "100", "120", "140", "160", "180", "step"]
    assert chart("nothing", [Series("empty", [])]) == ""
    assert number_text(9999999.0) == "9,999,999"
    assert number_text(1e7) == "1e+07"
    assert number_text(-1e7) == "-1e+07"
    assert number_text(1e-3) == "0.001"
    assert nice_ticks(0.3, 0.9, 4) == [0.4, 0.6, 0.8]


def test_a_long_curve_has_few_places_to_hover_over_and_a_noisy_one_none():
    points = [(float(step), 1.0) for step in range(1000)]
    marks = {}
    for style in ("line", "dashed", "faint", "dots"):
        svg = chart("", [Series("a", points, style=style)])
        marks[style] = svg.count("<circle")
    # Of 7 steps each one stays: 143; of these every third.
    assert marks == {"line": 48, "dashed": 48, "faint": 0, "dots": 143}


def test_the_legend_says_by_how_much_the_eval_loss_changed():
    assert _eval_label([(0, 0.5), (10, 0.7), (20, 0.4)]) == "eval loss 0.400, -20 %"
    assert _eval_label([(0, 0.5), (10, 0.75)]) == "eval loss 0.750, +50 %"
    assert _eval_label([(0, 0.5)]) == "eval loss 0.500"
    assert _eval_label([(0, 0.0), (10, 0.5)]) == "eval loss 0.500"
