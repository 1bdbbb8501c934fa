"""Sections of numbers and text: curves, checkpoints, time, warnings, commands."""

from __future__ import annotations

import shlex
from html import escape
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.errors import DataError
from simpletuner.reporting.loss_plot import is_regularisation, smoothed
from simpletuner.reporting.progress import duration_text
from simpletuner.reporting.report.charts import Series, chart, number_text
from simpletuner.reporting.report.record import Points, Record, RunRecord, numbers

MOST_ROWS = 60


def curve_section(run: RunRecord) -> str:
    """Loss first and large; then what explains it."""
    extra = [("ema_decay", "EMA decay")]
    charts = [
        _loss_chart(run),
        chart("Learning rate", [Series("learning rate", run.curve("learning_rate"), 3)]),
        chart("Gradient norm", _noisy("gradient norm", run.curve("grad_norm"), 4), note="before clipping"),
        _quantile_chart(run),
        _sigma_chart(run),
        chart("Seconds per step", _noisy("seconds", run.curve("seconds"), 1)),
        chart("Memory, GB", [Series("memory", run.curve("memory_gb"), 4)]),
        *_score_charts(run),
        *(chart(title, [Series(title, _extra(run, name), 3)]) for name, title in extra),
    ]
    shown = "".join(filter(None, charts))
    return f'<div class="charts">{shown}</div>' if shown else ""


def _loss_chart(run: RunRecord) -> str:
    """Steps on regularisation data alone have a loss of another kind, and a curve of their own."""
    train: Points = []
    prior: Points = []
    for record in run.steps:
        if isinstance(record.get("loss"), int | float):
            (prior if is_regularisation(record) else train).append((record["step"], float(record["loss"])))
    evaluation = run.eval_curve()
    series = [
        Series("each step", train, 1, "faint"),
        Series("training loss, smoothed", _smooth(train), 1),
        Series("distance from the base model", _smooth(prior), 3),
        Series("eval loss", evaluation, 2, "dots"),
    ]
    if (base := _base_loss(run)) is not None and len(evaluation) > 1:
        series.append(Series("eval loss of the base model", [(0.0, base), (float(run.last_step), base)], 2, "dashed"))
    note = "The eval loss sees the same images and noise each time, and is the curve to trust." if evaluation else ""
    return chart("Loss", series, note=note, is_wide=True)


def _base_loss(run: RunRecord) -> float | None:
    """The eval loss of the untouched base model; older runs have it as that of step 0."""
    references = [record["reference"] for record in run.evaluations if isinstance(record.get("reference"), int | float)]
    curve = run.eval_curve()
    if references:
        return float(references[-1])
    return curve[0][1] if curve and curve[0][0] == 0 else None


def _smooth(points: Points) -> Points:
    return [(float(step), value) for step, value in smoothed([(int(step), value) for step, value in points])]


def _noisy(label: str, points: Points, colour: int) -> list[Series]:
    return [Series("", points, colour, "faint"), Series(label, _smooth(points), colour)]


def _extra(run: RunRecord, name: str) -> Points:
    return numbers((record["step"], (record.get("extra") or {}).get(name)) for record in run.steps)


def _quantile_chart(run: RunRecord) -> str:
    """Where along the way from data to noise the model got better."""
    curves = [(record["step"], _quantiles(record)) for record in run.evaluations if _quantiles(record)]
    if not curves:
        return ""
    chosen = [curves[0], curves[-1]] if len(curves) > 1 else curves
    series = [
        Series(f"step {step}", points, 4 if index else 2, "line" if index or len(chosen) == 1 else "dashed")
        for index, (step, points) in enumerate(chosen)
    ]
    return chart("Eval loss by share of noise", series, x_label="quantile of the noise level")


def _sigma_chart(run: RunRecord) -> str:
    """The training loss by noise level, at the first and the last stretch of steps."""
    stretches = [run.by_sigma[0], run.by_sigma[-1]] if len(run.by_sigma) > 1 else run.by_sigma
    series = []
    for index, record in enumerate(stretches):
        bins = [each for each in record.get("bins", ()) if isinstance(each, list) and len(each) == 4]
        points = numbers(((each[0] + each[1]) / 2, each[2]) for each in bins)
        is_last = index == len(stretches) - 1
        label = f"steps {record.get('first_step')} to {record['step']}"
        series.append(Series(label, points, 1, "line" if is_last else "dashed"))
    return chart("Training loss by noise level", series, x_label="sigma")


def _quantiles(record: Record) -> Points:
    pairs = [pair for pair in record.get("per_quantile", ()) if isinstance(pair, list) and len(pair) == 2]
    return numbers((quantile, loss) for quantile, loss in pairs)


def _score_charts(run: RunRecord) -> list[str]:
    names = dict.fromkeys(str(record.get("metric")) for record in run.scores)
    return [
        chart(
            f"{name} score",
            [
                Series(
                    name, numbers((r["step"], r.get("mean")) for r in run.scores if r.get("metric") == name), 3, "dots"
                )
            ],
        )
        for name in names
    ]


def checkpoint_section(run: RunRecord) -> str:
    """The checkpoints that are still there, with the eval loss of their step; the best one is marked."""
    losses = dict(run.eval_curve())
    numbered = [record for record in run.checkpoints if record.get("eval_loss") is None]
    steps = sorted({int(record["step"]) for record in numbered if isinstance(record.get("step"), int)})
    there = [(step, run.output_dir / f"checkpoint-{step}") for step in steps]
    kept = [(step, path) for step, path in there if path.is_dir()]
    best_folder = run.output_dir / "checkpoint-best"
    if not (kept or best_folder.is_dir()):
        return ""
    lowest = run.best_evaluation()
    best = lowest[0] if lowest else None  # of all evaluations: a better one whose state was not saved leaves no best
    is_marked = best is not None and not best_folder.is_dir()
    rows = [
        _checkpoint_row(str(step), path, losses.get(step), is_marked and step == best)
        for step, path in kept[-MOST_ROWS:]
    ]
    if best_folder.is_dir():
        step, loss = _best_of(best_folder)
        rows.append(_checkpoint_row("" if step is None else str(step), best_folder, loss, step == best))
    removed = len(steps) - len(kept)
    earlier = "an earlier one" if removed == 1 else f"{removed} earlier ones"
    note = f'<p class="muted">{earlier} made room for later ones.</p>' if removed else ""
    head = '<tr><th>folder</th><th class="number">step</th><th class="number">eval loss</th><th></th></tr>'
    return f'<div class="card box scroll"><table>{head}{"".join(rows)}</table></div>{note}'


def _best_of(folder: Path) -> tuple[int | None, float | None]:
    """(step, eval loss) that the best checkpoint itself names."""
    try:
        metadata = storage.read_manifest(folder).metadata
        return int(metadata["global_step"]), float(metadata["eval_loss"])
    except (DataError, KeyError, TypeError, ValueError):
        return None, None


def _checkpoint_row(step: str, path: Path, loss: float | None, is_best: bool) -> str:
    shown = "" if loss is None else number_text(loss)
    mark = '<span class="pill finished">best</span>' if is_best else ""
    return (
        f'<tr><td class="code">{escape(path.name)}</td><td class="number">{step}</td><td class="number">{shown}</td>'
        f"<td>{mark}</td></tr>"
    )


def time_section(run: RunRecord) -> str:
    """What the run spent its time on, longest first."""
    spent = dict(run.phases)
    training = sum(seconds for _, seconds in run.curve("seconds"))
    if training:
        spent["optimizer steps"] = training
    evaluation = sum(value for record in run.evaluations if isinstance(value := record.get("seconds"), int | float))
    if evaluation:
        spent["evaluation"] = evaluation
    longest = sorted(spent.items(), key=lambda item: -item[1])[:12]
    if not longest or longest[0][1] <= 0:
        return ""
    rows = [
        f'<div class="stage"><span>{escape(name)}</span>{bar(seconds / longest[0][1])}'
        f"<b>{duration_text(seconds)}</b></div>"
        for name, seconds in longest
    ]
    return f'<div class="card box times">{"".join(rows)}</div>'


def bar(share: float) -> str:
    return f'<span class="track"><i style="width:{100 * share:.1f}%"></i></span>'


def warning_section(run: RunRecord) -> str:
    shown = "".join(f'<p class="warn">{escape(text)}</p>' for text in run.warnings[:MOST_ROWS])
    more = len(run.warnings) - MOST_ROWS
    return shown + (f'<p class="muted">and {more} more in metrics.jsonl</p>' if more > 0 else "")


def command_section(run: RunRecord) -> str:
    """Commands to go on with, most wanted first."""
    commands: list[tuple[str, Any]] = [("Draw with what was trained", each) for each in run.end.get("commands") or ()]
    if run.lock.get("command"):
        title = "Start the same run again" if run.state == "finished" else "Go on from the last checkpoint"
        commands.append((title, run.lock["command"]))
    if (run.output_dir / "logs").is_dir():
        commands.append(
            ("Look at the curves in TensorBoard", f"tensorboard --logdir {_quoted(run.output_dir / 'logs')}")
        )
    commands.append(("Make this page again", f"simpletuner report {_quoted(run.output_dir)}"))
    return "".join(f"<h3>{escape(title)}</h3><pre>{escape(str(command))}</pre>" for title, command in commands)


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
