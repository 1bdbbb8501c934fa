"""The images of a run: a row for each prompt, a column for each step, so that learning can be seen."""

from __future__ import annotations

from html import escape

from simpletuner.reporting.report.images import Embedder
from simpletuner.reporting.report.record import RunRecord, ShownImage

MOST_COLUMNS, MOST_ROWS = 8, 40

# (step, kind of weights); the base model comes first.
Column = tuple[int, str]
Cells = dict[tuple[str, Column], ShownImage]


def shown_images(run: RunRecord) -> Cells:
    """(row, column) -> image: all prompts, and of the steps some that are spread over the run."""
    cells: Cells = {}
    for image in run.images:
        step = 0 if image.kind == "base" else image.step
        cells[image.row, (step, image.kind)] = image
    steps = sorted({step for _, (step, kind) in cells if kind == "live"})
    ema = sorted({step for _, (step, kind) in cells if kind == "ema"})
    kept: set[Column] = {(0, "base")} | {(step, "live") for step in spread(steps, MOST_COLUMNS)}
    # The average is shown at the end, or throughout where it is all there is.
    kept |= {(step, "ema") for step in (ema[-1:] if steps else spread(ema, MOST_COLUMNS))}
    rows = list(dict.fromkeys(row for row, _ in cells))[:MOST_ROWS]
    return {(row, column): image for (row, column), image in cells.items() if column in kept and row in rows}


def spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly over the run, the last always among them."""
    if len(steps) <= count:
        return steps
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]


def image_section(run: RunRecord, embed: Embedder) -> str:
    cells = shown_images(run)
    if not cells:
        return ""
    columns = sorted({column for _, column in cells}, key=_order)
    head = "".join(f"<th>{escape(_heading(column))}</th>" for column in columns)
    body = "".join(_row(row, columns, cells, embed) for row in dict.fromkeys(row for row, _ in cells))
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="card scroll shots">{table}</div><p class="muted">A click on an image enlarges it.</p>'


def _row(row: str, columns: list[Column], cells: Cells, embed: Embedder) -> str:
    prompt = next(image.prompt for (each, _), image in cells.items() if each == row)
    shown = "".join(f"<td>{_cell(cells.get((row, column)), embed)}</td>" for column in columns)
    words = f'<b>{escape(row)}</b><span title="{escape(prompt)}">{escape(prompt)}</span>'
    return f'<tr><th class="prompt">{words}</th>{shown}</tr>'


def _cell(image: ShownImage | None, embed: Embedder) -> str:
    if image is None:
        return ""
    alt = f"{image.prompt}, {_heading((image.step, image.kind))}"
    return f'<details class="pic"><summary>{embed.img(image.path, alt)}</summary></details>'


def _order(column: Column) -> tuple[bool, bool, int]:
    step, kind = column
    return kind != "base", kind == "ema", step


def _heading(column: Column) -> str:
    step, kind = column
    return "base model" if kind == "base" else f"step {step:,}" + (", EMA" if kind == "ema" else "")
