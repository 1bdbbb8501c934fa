"""The loss curve of a run as a PNG, plotted from `metrics.jsonl` with Pillow alone.

Training loss is noisy (each step sees other timesteps), so its smoothed course is plotted over the raw one. Steps on
regularisation data alone have a loss of another kind (distance from the base model) and a curve of their own. The eval
loss, which sees the same noise each time, is plotted point by point and is the curve to trust.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.fonts import font_for
from simpletuner.reporting.sinks.jsonl import read_records
from simpletuner.storage import replacing_file
from simpletuner.text import printable

if TYPE_CHECKING:
    from PIL.ImageDraw import ImageDraw

Points = list[tuple[int, float]]

WIDTH, HEIGHT = 1200, 720
LEFT, RIGHT, TOP, BOTTOM = 96, 36, 88, 84
OVERSAMPLE = 2  # Pillow draws hard edges: draw at twice the size, then shrink.

INK, MUTED, GRID, PAPER = "#1f2933", "#6b7785", "#e6e9ed", "#ffffff"
RAW, SMOOTH, PRIOR, EVAL = "#c5d7ee", "#2a6fbb", "#3a9d6e", "#d9582b"


@dataclass(frozen=True)
class Curves:
    """What is plotted: (step, loss) pairs in order of step; `prior` are the steps on regularisation data alone."""

    run_name: str = ""
    train: Points = field(default_factory=list)
    prior: Points = field(default_factory=list)
    evaluation: Points = field(default_factory=list)


def plot_loss(metrics: Path, destination: Path) -> Path | None:
    """Draw the curves of `metrics` to `destination` (PNG); None where no loss was recorded.

    Raises:
        DataError, OSError: the file cannot be written.
    """
    curves = read_curves(metrics)
    if not (curves.train or curves.prior or curves.evaluation):
        return None
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH * OVERSAMPLE, HEIGHT * OVERSAMPLE), PAPER)
    _draw(ImageDraw.Draw(image), curves)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with replacing_file(destination) as temporary:
        image.resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS).save(temporary, format="PNG")
    return destination


def read_curves(metrics: Path) -> Curves:
    """The losses of a metrics file. Where a resume evaluated a step twice, the later record counts."""
    train: dict[int, float] = {}
    prior: dict[int, float] = {}
    evaluation: dict[int, float] = {}
    run_name = ""
    for record in read_records(metrics):
        kind, step = record.get("event"), int(record.get("step", 0))
        if kind == "run_started":
            run_name = str(record.get("run_name", ""))
        elif kind == "step_done" and isinstance(record.get("loss"), int | float):
            (prior if is_regularisation(record) else train)[step] = float(record["loss"])
        elif kind == "eval_done" and isinstance(record.get("pooled"), int | float):
            evaluation[step] = float(record["pooled"])
    return Curves(run_name, sorted(train.items()), sorted(prior.items()), sorted(evaluation.items()))


def is_regularisation(record: Mapping[str, Any]) -> bool:
    """As `StepDone.is_regularisation`, of a record of `metrics.jsonl`."""
    return (record.get("extra") or {}).get("regularisation_loss") == record["loss"]


def smoothed(points: Points) -> Points:
    """Exponential mean over about a thirtieth of the run, corrected for its start, so that step 1 is not special."""
    decay = 1 - 1 / max(1.0, len(points) / 30)
    total, weight, result = 0.0, 0.0, []
    for step, value in points:
        total, weight = decay * total + (1 - decay) * value, decay * weight + (1 - decay)
        result.append((step, total / weight))
    return result


def nice_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) that lie within [low, high]."""
    span = high - low
    if span <= 0:
        return [low]
    magnitude = 10 ** math.floor(math.log10(span / count))
    step = next(magnitude * factor for factor in (1, 2, 5, 10) if span / (magnitude * factor) <= count)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


@dataclass(frozen=True)
class _Axes:
    """Maps (step, loss) to pixels of the oversampled image."""

    last_step: int
    low: float
    high: float

    def point(self, step: float, loss: float) -> tuple[float, float]:
        inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        share = (min(max(loss, self.low), self.high) - self.low) / (self.high - self.low)
        x = LEFT + inner_width * step / max(1, self.last_step)
        return x * OVERSAMPLE, (TOP + inner_height * (1 - share)) * OVERSAMPLE


def _draw(draw: ImageDraw, curves: Curves) -> None:
    axes = _axes(curves)
    _plot_frame(draw, axes, curves)
    _line(draw, axes, curves.train, RAW, 1.5)
    _line(draw, axes, smoothed(curves.train), SMOOTH, 3)
    _line(draw, axes, smoothed(curves.prior), PRIOR, 2.5)
    _line(draw, axes, curves.evaluation, EVAL, 2.5)
    for step, loss in curves.evaluation:
        x, y = axes.point(step, loss)
        radius = 5 * OVERSAMPLE
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=EVAL, outline=PAPER, width=2 * OVERSAMPLE)
    _plot_legend(draw, curves)


def _axes(curves: Curves) -> _Axes:
    """Room for the smoothed and eval curves and nearly all raw steps; a few wild steps may touch the edge."""
    raw = sorted(loss for _, loss in curves.train)
    shown = raw[len(raw) // 100 : max(1, len(raw) - len(raw) // 100)]
    plotted = [*smoothed(curves.train), *smoothed(curves.prior), *curves.evaluation]
    values = [*shown, *(loss for _, loss in plotted)]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    last_step = max(step for step, _ in plotted)
    return _Axes(last_step, max(0.0, low - margin) if low >= 0 else low - margin, high + margin)


def _plot_frame(draw: ImageDraw, axes: _Axes, curves: Curves) -> None:
    for tick in nice_ticks(axes.low, axes.high, 6):
        left, y = axes.point(0, tick)
        right, _ = axes.point(axes.last_step, tick)
        draw.line((left, y, right, y), fill=GRID, width=OVERSAMPLE)
        _text(draw, (LEFT - 12, y / OVERSAMPLE), f"{tick:g}", MUTED, 17, "rm")
    baseline = axes.point(0, axes.low)[1] / OVERSAMPLE
    for tick in nice_ticks(0, axes.last_step, 8):
        if tick == int(tick):
            x = axes.point(tick, axes.low)[0] / OVERSAMPLE
            _text(draw, (x, baseline + 12), f"{int(tick)}", MUTED, 17, "mt")
    draw.line((*axes.point(0, axes.low), *axes.point(axes.last_step, axes.low)), fill=MUTED, width=OVERSAMPLE)
    _text(draw, (LEFT, 26), curves.run_name or "loss", INK, 24, "lt")
    _text(draw, (LEFT - 12, TOP - 14), "loss", MUTED, 17, "rb")
    _text(draw, ((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 22), "optimizer step", MUTED, 17, "mb")


def _plot_legend(draw: ImageDraw, curves: Curves) -> None:
    """Right-aligned above the plot, with the last value of each curve."""
    entries = []
    if curves.evaluation:
        first, last = curves.evaluation[0][1], curves.evaluation[-1][1]
        change = f", {100 * (last / first - 1):+.0f} %" if len(curves.evaluation) > 1 and first else ""
        entries.append((EVAL, f"eval loss {last:.3f}{change}"))
    if curves.train:
        entries.append((SMOOTH, f"training loss {smoothed(curves.train)[-1][1]:.3f}"))
    if curves.prior:
        entries.append((PRIOR, f"distance from the base {smoothed(curves.prior)[-1][1]:.3f}"))
    right = float(WIDTH - RIGHT)
    for colour, label in entries:
        _text(draw, (right, 40), label, INK, 17, "rm")
        right -= _text_width(draw, label, 17) + 12
        draw.line(
            ((right - 26) * OVERSAMPLE, 40 * OVERSAMPLE, right * OVERSAMPLE, 40 * OVERSAMPLE),
            fill=colour,
            width=4 * OVERSAMPLE,
        )
        right -= 26 + 28


def _line(draw: ImageDraw, axes: _Axes, points: Points, colour: str, width: float) -> None:
    if len(points) > 1:
        pixels = [axes.point(step, loss) for step, loss in points]
        draw.line(pixels, fill=colour, width=round(width * OVERSAMPLE), joint="curve")


def _text(draw: ImageDraw, at: Sequence[float], text: str, colour: str, size: int, anchor: str) -> None:
    where = (at[0] * OVERSAMPLE, at[1] * OVERSAMPLE)
    text = printable(text)  # the name of a run may be that of a folder, with line breaks
    draw.text(where, text, fill=colour, font=font_for(text, size * OVERSAMPLE), anchor=anchor)


def _text_width(draw: ImageDraw, text: str, size: int) -> float:
    return draw.textlength(text, font=font_for(text, size * OVERSAMPLE)) / OVERSAMPLE
