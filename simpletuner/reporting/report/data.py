"""The data of a run: what became of the files of each dataset, and images as they were trained on."""

from __future__ import annotations

from html import escape
from typing import Any

from simpletuner.reporting.report.images import Embedder
from simpletuner.reporting.report.record import Record, RunRecord
from simpletuner.reporting.report.sections import bar

STAGES = (
    *(("found", "found"), ("readable", "readable"), ("large_enough", "large enough"), ("captioned", "captioned")),
    ("bucketed", "used"),
)
MOST_SIZES = 12


def data_section(run: RunRecord, embed: Embedder) -> str:
    return "".join(_dataset(run, each, embed) for each in run.datasets)


def _dataset(run: RunRecord, report: Record, embed: Embedder) -> str:
    name = str(report.get("id", ""))
    cards = [("FilterReport", _filter_report(report)), ("Sizes, width x height", _sizes(report))]
    if lost := _skipped(report):
        cards.append(("Not used", lost))
    boxes = "".join(f'<div class="card"><h3>{title}</h3>{body}</div>' for title, body in cards)
    tiles = "".join(
        f'<figure><details class="pic"><summary>{embed.img(path, caption)}</summary></details>'
        f'<figcaption title="{escape(caption)}">{escape(caption)}<small>{escape(note)}</small></figcaption></figure>'
        for path, caption, note in run.contact.get(name, ())
    )
    sheet = f'<div class="tiles">{tiles}</div>' if tiles else ""
    return f'<h3>{escape(name)}</h3><div class="columns">{boxes}</div>{sheet}'


def _filter_report(report: Record) -> str:
    most = max(_count(report.get("found")), 1)
    rows = [
        f'<div class="stage"><span>{label}</span>{bar(_count(report.get(key)) / most)}'
        f"<b>{_count(report.get(key)):,}</b></div>"
        for key, label in STAGES
    ]
    return "".join(rows) + f'<p class="muted">{_count(report.get("per_epoch")):,} in each epoch</p>'


def _sizes(report: Record) -> str:
    sizes = report.get("sizes")
    if not isinstance(sizes, dict):
        return ""
    ordered = sorted(((str(size), _count(count)) for size, count in sizes.items()), key=lambda item: -item[1])
    rows = "".join(f'<tr><td>{escape(size)}</td><td class="number">{n:,}</td></tr>' for size, n in ordered[:MOST_SIZES])
    others = sum(count for _, count in ordered[MOST_SIZES:])
    if others:
        rows += f'<tr><td>{len(ordered) - MOST_SIZES} other sizes</td><td class="number">{others:,}</td></tr>'
    return f"<table>{rows}</table>"


def _skipped(report: Record) -> str:
    reasons = [each for each in report.get("set_aside") or () if isinstance(each, dict)]
    return "".join(
        f"<p><b>{_count(each.get('count')):,}</b> {escape(str(each.get('reason', '')))}"
        f'<br><span class="muted">{escape(", ".join(map(str, (each.get("examples") or ())[:3])))}</span></p>'
        for each in reasons
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0
