"""What the report shows of a run, as values for `templates/report.html`."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from simpletuner import __version__, storage
from simpletuner.errors import DataError
from simpletuner.reporting.charts import number_text
from simpletuner.reporting.progress import duration_text
from simpletuner.reporting.report.curves import figures_of
from simpletuner.reporting.report.images import Embedder
from simpletuner.reporting.report.record import MetricsLine, RunRecord, ShownImage
from simpletuner.reporting.report.settings import options_of, versions_of

MAX_COLUMNS, MAX_ROWS = 8, 40
MAX_CHECKPOINTS, MAX_WARNINGS, MAX_TIMES = 60, 60, 12
STAGES = (
    *(("found", "found"), ("readable", "readable"), ("large_enough", "large enough"), ("captioned", "captioned")),
    ("bucketed", "used"),
)

# (step, kind of weights); the base model comes first.
Column = tuple[int, str]


def view_of(run: RunRecord) -> dict[str, Any]:
    """All values of the page."""
    shown = shown_images(run)
    embed = Embedder(len(shown) + sum(len(each) for each in run.contact.values()))
    details = run.start.get("details") or {}
    when = "" if run.last_time is None else f"{datetime.fromtimestamp(run.last_time, UTC):%d %B %Y, %H:%M UTC}"
    return {
        "name": run.name,
        "state": run.state,
        "version": __version__,
        "facts": [str(details[name]) for name in ("model", "training", "device") if details.get(name)],
        "when": when.lstrip("0"),
        "failure": "" if run.state == "finished" else str(run.end.get("message") or ""),
        "tiles": tiles_of(run),
        "figures": figures_of(run),
        "gallery": gallery_of(shown, embed),
        "checkpoints": checkpoints_of(run),
        "datasets": [dataset_of(run, report, embed) for report in run.datasets],
        "times": times_of(run),
        "warnings": {"shown": run.warnings[:MAX_WARNINGS], "num_more": max(len(run.warnings) - MAX_WARNINGS, 0)},
        "options": options_of(run),
        "versions": versions_of(run),
        "commands": commands_of(run),
        "embed": embed,
    }


def tiles_of(run: RunRecord) -> list[tuple[str, str, str]]:
    """The numbers that one looks for first: (value, label, note)."""
    total = run.start.get("total_steps")
    found: list[tuple[str, str, str]] = []
    if run.last_step or total:
        found.append((f"{run.last_step:,}", "optimizer steps", f"of {total:,}" if isinstance(total, int) else ""))
    if best := run.best_evaluation():
        first = run.eval_curve()[0]
        change = f"{100 * (best[1] / first[1] - 1):+.0f} % since step {int(first[0])}" if first[1] > 0 else ""
        found.append((number_text(best[1]), f"lowest eval loss, step {best[0]:,}", change))
    if scores := [record for record in run.scores if isinstance(record.get("mean"), int | float)]:
        found.append((number_text(scores[-1]["mean"]), f"{scores[-1].get('metric', 'score')} score", "at the end"))
    if speeds := sorted(seconds for _, seconds in run.curve("seconds")):
        middle = speeds[len(speeds) // 2]
        samples = run.steps[-1].get("samples")
        rate = f"{number_text(samples / middle)} images/s" if isinstance(samples, int) and middle > 0 else ""
        found.append((f"{number_text(middle)} s", "per step, median", rate))
        found.append((duration_text(sum(speeds)), "of training", "without validation and evaluation"))
    if memory := run.curve("memory_gb"):
        found.append((f"{max(value for _, value in memory):.1f} GB", "peak memory", ""))
    return found


def shown_images(run: RunRecord) -> dict[tuple[str, Column], ShownImage]:
    """(row, column) -> image: all prompts, and of the steps some that are spread over the run."""
    cells: dict[tuple[str, Column], ShownImage] = {}
    for image in run.images:
        step = 0 if image.kind == "base" else image.step
        cells[image.row, (step, image.kind)] = image
    steps = sorted({step for _, (step, kind) in cells if kind == "live"})
    ema = sorted({step for _, (step, kind) in cells if kind == "ema"})
    kept: set[Column] = {(0, "base")} | {(step, "live") for step in spread(steps, MAX_COLUMNS)}
    # The EMA is shown at the end, or throughout if it is all there is.
    kept |= {(step, "ema") for step in (ema[-1:] if steps else spread(ema, MAX_COLUMNS))}
    rows = list(dict.fromkeys(row for row, _ in cells))[:MAX_ROWS]
    return {(row, column): image for (row, column), image in cells.items() if column in kept and row in rows}


def spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly over the run, always with the last."""
    if len(steps) <= count:
        return steps
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]


def gallery_of(cells: dict[tuple[str, Column], ShownImage], embed: Embedder) -> dict[str, Any]:
    """A row for each prompt, a column for each step: base model, then steps, then the EMA."""
    columns = sorted({column for _, column in cells}, key=lambda each: (each[1] != "base", each[1] == "ema", each[0]))
    titles = [
        "base model" if kind == "base" else f"step {step:,}" + (", EMA" if kind == "ema" else "")
        for step, kind in columns
    ]
    rows = []
    for name in dict.fromkeys(row for row, _ in cells):
        images = [cells.get((name, column)) for column in columns]
        rows.append(
            {
                "name": name,
                "prompt": next(image.prompt for image in images if image),
                "cells": [
                    embed.img(image.path, f"{image.prompt}, {title}") if image else ""
                    for image, title in zip(images, titles, strict=True)
                ],
            }
        )
    return {"titles": titles, "rows": rows}


def checkpoints_of(run: RunRecord) -> dict[str, Any]:
    """The checkpoints that still exist, with the eval loss of their step; the best one is marked."""
    losses = dict(run.eval_curve())
    numbered = [record for record in run.checkpoints if record.get("eval_loss") is None]
    steps = sorted({int(record["step"]) for record in numbered if isinstance(record.get("step"), int)})
    kept = [step for step in steps if (run.output_dir / f"checkpoint-{step}").is_dir()]
    best_folder = run.output_dir / "checkpoint-best"
    lowest = run.best_evaluation()
    best = lowest[0] if lowest else None  # of all evaluations: a better one whose state was not saved has no folder
    is_marked = best is not None and not best_folder.is_dir()
    rows = [
        _checkpoint(f"checkpoint-{step}", step, losses.get(step), is_marked and step == best)
        for step in kept[-MAX_CHECKPOINTS:]
    ]
    if best_folder.is_dir():
        best_step, loss = _best_of(best_folder)
        rows.append(_checkpoint(best_folder.name, best_step, loss, best_step == best))
    return {"rows": rows, "num_removed": len(steps) - len(kept)}


def _checkpoint(name: str, step: int | None, loss: float | None, is_best: bool) -> dict[str, Any]:
    shown = "" if loss is None else number_text(loss)
    return {"name": name, "step": "" if step is None else step, "loss": shown, "is_best": is_best}


def _best_of(folder: Path) -> tuple[int | None, float | None]:
    """(step, eval loss) that the best checkpoint's manifest names."""
    try:
        metadata = storage.read_manifest(folder).metadata
        return int(metadata["global_step"]), float(metadata["eval_loss"])
    except (DataError, KeyError, TypeError, ValueError):
        return None, None


def dataset_of(run: RunRecord, report: MetricsLine, embed: Embedder) -> dict[str, Any]:
    """How many files of a dataset passed each filter, and images as they were trained on."""
    name = str(report.get("id", ""))
    most = max(_count(report.get("found")), 1)
    sizes = report.get("sizes")
    skipped = [each for each in report.get("set_aside") or () if isinstance(each, dict)]
    return {
        "name": name,
        "stages": [(label, _count(report.get(key)) / most, f"{_count(report.get(key)):,}") for key, label in STAGES],
        "per_epoch": f"{_count(report.get('per_epoch')):,}",
        "sizes": sorted(
            ((str(size), _count(count)) for size, count in sizes.items()) if isinstance(sizes, dict) else (),
            key=lambda item: -item[1],
        ),
        "skipped": [
            {
                "count": f"{_count(each.get('count')):,}",
                "reason": str(each.get("reason", "")),
                "examples": ", ".join(map(str, (each.get("examples") or ())[:3])),
            }
            for each in skipped
        ],
        "tiles": [(embed.img(path, caption), caption, note) for path, caption, note in run.contact.get(name, ())],
    }


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def times_of(run: RunRecord) -> list[tuple[str, float, str]]:
    """What the run spent its time on, longest first: (name, share of the longest, duration)."""
    spent = dict(run.phases)
    if training := sum(seconds for _, seconds in run.curve("seconds")):
        spent["optimizer steps"] = training
    if evaluation := sum(value for each in run.evaluations if isinstance(value := each.get("seconds"), int | float)):
        spent["evaluation"] = evaluation
    longest = sorted(spent.items(), key=lambda item: -item[1])[:MAX_TIMES]
    if not longest or longest[0][1] <= 0:
        return []
    return [(name, seconds / longest[0][1], duration_text(seconds)) for name, seconds in longest]


def commands_of(run: RunRecord) -> list[tuple[str, str]]:
    """Commands to continue with, most wanted first."""
    folder = shlex.quote(str(run.output_dir))
    commands = [("Generate images with the trained weights", str(each)) for each in run.end.get("commands") or ()]
    if run.lock.get("command"):
        title = "Start the same run again" if run.state == "finished" else "Resume from the last checkpoint"
        commands.append((title, str(run.lock["command"])))
    if (run.output_dir / "logs").is_dir():
        logs = shlex.quote(str(run.output_dir / "logs"))
        commands.append(("Open the curves in TensorBoard", f"tensorboard --logdir {logs}"))
    return [*commands, ("Update this page", f"simpletuner report {folder}")]
