"""The charts of the report: loss first and large, then what explains it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simpletuner.reporting.charts import Series, chart, legend, loss_series, smoothed
from simpletuner.reporting.loss_plot import is_regularisation
from simpletuner.reporting.report.record import MetricsLine, Points, RunRecord, numbers

WIDTH, WIDE, HEIGHT = 640, 1240, 260


@dataclass(frozen=True)
class Figure:
    """One chart of the page; it has no `svg` if there are no points."""

    title: str
    svg: str
    legend: list[Series]
    note: str = ""
    is_wide: bool = False


def figures_of(run: RunRecord) -> list[Figure]:
    """The charts that have points."""
    figures = [
        _loss(run),
        _figure("Learning rate", [Series("learning rate", run.curve("learning_rate"), 3)]),
        _figure("Gradient norm", _noisy("gradient norm", run.curve("grad_norm"), 4), note="before clipping"),
        _eval_by_quantile(run),
        _loss_by_sigma(run),
        _figure("Seconds per step", _noisy("seconds", run.curve("seconds"), 1)),
        _figure("Memory, GB", [Series("memory", run.curve("memory_gb"), 4)]),
        *_scores(run),
        _figure("EMA decay", [Series("EMA decay", _extra(run, "ema_decay"), 3)]),
    ]
    return [figure for figure in figures if figure.svg]


def _figure(
    title: str, series: list[Series], x_label: str = "optimizer step", note: str = "", is_wide: bool = False
) -> Figure:
    svg = chart(title, series, x_label, (WIDE if is_wide else WIDTH, HEIGHT))
    return Figure(title, svg, legend(series), note, is_wide)


def _loss(run: RunRecord) -> Figure:
    train: Points = []
    prior: Points = []
    for record in run.steps:
        if isinstance(record.get("loss"), int | float):
            (prior if is_regularisation(record) else train).append((record["step"], float(record["loss"])))
    evaluation = run.eval_curve()
    series = loss_series(train, prior, evaluation, _base_loss(run), float(run.last_step))
    note = "The eval loss uses the same images and noise each time; it is the curve to trust." if evaluation else ""
    return _figure("Loss", series, note=note, is_wide=True)


def _base_loss(run: RunRecord) -> float | None:
    """The eval loss of the untouched base model; older runs have it as that of step 0."""
    recorded = [each["reference"] for each in run.evaluations if isinstance(each.get("reference"), int | float)]
    curve = run.eval_curve()
    if recorded:
        return float(recorded[-1])
    return curve[0][1] if curve and curve[0][0] == 0 else None


def _noisy(label: str, points: Points, color: int) -> list[Series]:
    return [Series("", points, color, "faint"), Series(label, smoothed(points), color)]


def _extra(run: RunRecord, name: str) -> Points:
    return numbers((record["step"], (record.get("extra") or {}).get(name)) for record in run.steps)


def _eval_by_quantile(run: RunRecord) -> Figure:
    """At which noise levels the model improved."""
    curves = [(record["step"], points) for record in run.evaluations if (points := _quantiles(record))]
    series = [
        Series(f"step {step}", points, 4 if is_last else 2, "line" if is_last else "dashed")
        for (step, points), is_last in _first_and_last(curves)
    ]
    return _figure("Eval loss by share of noise", series, x_label="quantile of the noise level")


def _quantiles(record: MetricsLine) -> Points:
    pairs = [pair for pair in record.get("per_quantile", ()) if isinstance(pair, list) and len(pair) == 2]
    return numbers((quantile, loss) for quantile, loss in pairs)


def _loss_by_sigma(run: RunRecord) -> Figure:
    """The training loss by noise level, at the first and the last stretch of steps."""
    series = []
    for record, is_last in _first_and_last(run.by_sigma):
        bins = [each for each in record.get("bins", ()) if isinstance(each, list) and len(each) == 4]
        points = numbers(((each[0] + each[1]) / 2, each[2]) for each in bins)
        label = f"steps {record.get('first_step')} to {record['step']}"
        series.append(Series(label, points, 1, "line" if is_last else "dashed"))
    return _figure("Training loss by noise level", series, x_label="sigma")


def _first_and_last(items: list[Any]) -> list[tuple[Any, bool]]:
    return [(items[0], False), (items[-1], True)] if len(items) > 1 else [(each, True) for each in items]


def _scores(run: RunRecord) -> list[Figure]:
    found = []
    for name in dict.fromkeys(str(record.get("metric")) for record in run.scores):
        points = numbers((each["step"], each.get("mean")) for each in run.scores if each.get("metric") == name)
        found.append(_figure(f"{name} score", [Series(name, points, 3, "dots")]))
    return found
