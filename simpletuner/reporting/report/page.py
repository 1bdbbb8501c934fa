"""The page as a whole: its head, the figures at the top, and the order of its sections."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from html import escape

from simpletuner import __version__
from simpletuner.reporting.progress import duration_text
from simpletuner.reporting.report.charts import number_text
from simpletuner.reporting.report.data import data_section
from simpletuner.reporting.report.gallery import image_section, shown_images
from simpletuner.reporting.report.images import Embedder
from simpletuner.reporting.report.record import RunRecord
from simpletuner.reporting.report.sections import (
    checkpoint_section,
    command_section,
    curve_section,
    time_section,
    warning_section,
)
from simpletuner.reporting.report.settings import option_section, version_section
from simpletuner.reporting.report.style import STYLE

Section = tuple[str, str, Callable[[RunRecord], str]]

# Nothing is fetched and nothing runs, whatever a caption or a path says.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(run: RunRecord) -> str:
    """The whole page. Every text that comes from the run is escaped."""
    num_contact = sum(len(each) for each in run.contact.values())
    embed = Embedder(len(shown_images(run)) + num_contact)
    sections: tuple[Section, ...] = (
        ("curves", "Curves", curve_section),
        ("pictures", "Images", lambda run: image_section(run, embed)),
        ("checkpoints", "Checkpoints", checkpoint_section),
        ("data", "Data", lambda run: data_section(run, embed)),
        ("time", "Where the time went", time_section),
        ("warnings", "What was reported", warning_section),
        ("options", "Configuration", option_section),
        ("versions", "Versions and digests", version_section),
        ("commands", "What to do with it", command_section),
    )
    made = [(anchor, title, body) for anchor, title, make in sections if (body := make(run))]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in made)
    bodies = "".join(f'<section id="{anchor}"><h2>{title}</h2>{body}</section>' for anchor, title, body in made)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="referrer" content="no-referrer">'
        f"<title>{escape(run.name)}: run report</title><style>{STYLE}</style></head>\n<body><main>"
        f"{_head(run)}<nav>{links}</nav>{_figures(run)}{bodies}{_foot(embed)}</main></body></html>\n"
    )


def _head(run: RunRecord) -> str:
    details = run.start.get("details") or {}
    facts = " · ".join(escape(str(details[name])) for name in ("model", "training", "device") if details.get(name))
    when = ""
    if run.last_time is not None:
        when = datetime.fromtimestamp(run.last_time, UTC).strftime("%d %B %Y, %H:%M UTC").lstrip("0")
    message = run.end.get("message")
    failure = f'<p class="warn bad">{escape(str(message))}</p>' if message and run.state != "finished" else ""
    return (
        f'<header><div class="title"><h1>{escape(run.name)}</h1><span class="pill {run.state}">{run.state}</span></div>'
        f'<p class="muted">{facts}</p><p class="muted">{when}</p>{failure}</header>'
    )


def _figures(run: RunRecord) -> str:
    """The numbers that one looks for first."""
    total = run.start.get("total_steps")
    found: list[tuple[str, str, str]] = []
    if run.last_step or total:
        found.append((f"{run.last_step:,}", "optimizer steps", f"of {total:,}" if isinstance(total, int) else ""))
    if best := run.best_evaluation():
        first = run.eval_curve()[0]
        change = f"{100 * (best[1] / first[1] - 1):+.0f} % since step {int(first[0])}" if first[1] > 0 else ""
        found.append((number_text(best[1]), f"lowest eval loss, step {best[0]:,}", change))
    if clip := [record for record in run.scores if isinstance(record.get("mean"), int | float)]:
        found.append((number_text(clip[-1]["mean"]), f"{clip[-1].get('metric', 'score')} score", "at the end"))
    if speeds := sorted(seconds for _, seconds in run.curve("seconds")):
        middle = speeds[len(speeds) // 2]
        samples = run.steps[-1].get("samples")
        rate = f"{number_text(samples / middle)} images/s" if isinstance(samples, int) and middle > 0 else ""
        found.append((f"{number_text(middle)} s", "per step, median", rate))
        found.append((duration_text(sum(speeds)), "of training", "images and evaluation apart"))
    if memory := run.curve("memory_gb"):
        found.append((f"{max(value for _, value in memory):.1f} GB", "memory at most", ""))
    cards = "".join(
        f'<div class="card"><b>{escape(value)}</b>{escape(label)}<small>{escape(note)}</small></div>'
        for value, label, note in found
    )
    return f'<div class="figures">{cards}</div>' if cards else ""


def _foot(embed: Embedder) -> str:
    left_out = f" {embed.left_out} images were left out to keep the file small." if embed.left_out else ""
    return f"<footer>Made by simpletuner {escape(__version__)}.{left_out}</footer>"
