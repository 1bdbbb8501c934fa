"""The pictures of a run: a row for each prompt, a column for each step, so that learning can be seen."""

from __future__ import annotations

from html import escape

from simpletuner.reporting.report.images import Embedder
from simpletuner.reporting.report.record import RunRecord, ShownPicture

MOST_COLUMNS, MOST_ROWS = 8, 40

# (step, kind of weights); the base model comes first.
Column = tuple[int, str]
Cells = dict[tuple[str, Column], ShownPicture]


def shown_pictures(run: RunRecord) -> Cells:
    """(row, column) -> picture: all prompts, and of the steps some that are spread over the run."""
    cells: Cells = {}
    for picture in run.pictures:
        step = 0 if picture.kind == "base" else picture.step
        cells[picture.row, (step, picture.kind)] = picture
    steps = sorted({step for _, (step, kind) in cells if kind == "live"})
    ema = sorted({step for _, (step, kind) in cells if kind == "ema"})
    kept: set[Column] = {(0, "base")} | {(step, "live") for step in spread(steps, MOST_COLUMNS)}
    # The average is shown at the end, or throughout where it is all there is.
    kept |= {(step, "ema") for step in (ema[-1:] if steps else spread(ema, MOST_COLUMNS))}
    rows = list(dict.fromkeys(row for row, _ in cells))[:MOST_ROWS]
    return {(row, column): picture for (row, column), picture in cells.items() if column in kept and row in rows}


def spread(steps: list[int], count: int) -> list[int]:
    """At most `count` of the steps, evenly over the run, the last always among them."""
    if len(steps) <= count:
        return steps
    return [steps[round(index * (len(steps) - 1) / (count - 1))] for index in range(count)]


def picture_section(run: RunRecord, embed: Embedder) -> str:
    cells = shown_pictures(run)
    if not cells:
        return ""
    columns = sorted({column for _, column in cells}, key=_order)
    head = "".join(f"<th>{escape(_heading(column))}</th>" for column in columns)
    body = "".join(_row(row, columns, cells, embed) for row in dict.fromkeys(row for row, _ in cells))
    table = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="card scroll shots">{table}</div><p class="muted">A click on a picture enlarges it.</p>'


def _row(row: str, columns: list[Column], cells: Cells, embed: Embedder) -> str:
    prompt = next(picture.prompt for (each, _), picture in cells.items() if each == row)
    shown = "".join(f"<td>{_cell(cells.get((row, column)), embed)}</td>" for column in columns)
    words = f'<b>{escape(row)}</b><span title="{escape(prompt)}">{escape(prompt)}</span>'
    return f'<tr><th class="prompt">{words}</th>{shown}</tr>'


def _cell(picture: ShownPicture | None, embed: Embedder) -> str:
    if picture is None:
        return ""
    alt = f"{picture.prompt}, {_heading((picture.step, picture.kind))}"
    return f'<details class="pic"><summary>{embed.img(picture.path, alt)}</summary></details>'


def _order(column: Column) -> tuple[bool, bool, int]:
    step, kind = column
    return kind != "base", kind == "ema", step


def _heading(column: Column) -> str:
    step, kind = column
    return "base model" if kind == "base" else f"step {step:,}" + (", EMA" if kind == "ema" else "")
