"""Curves as SVG, for the report and the monitor's page: sharp at any size, in the page's colors, with values to hover.

The report runs no script and the monitor's page reloads a chart while a run goes on; both get it from here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from markupsafe import Markup

from simpletuner.templating import render

Points = Sequence[tuple[float, float]]
Style = Literal["line", "faint", "dots", "dashed"]

LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 30
MAX_POINTS = 320
MAX_HOVER_POINTS = 40
# Smallest value on a logarithmic axis.
SMALLEST = 1e-8


@dataclass(frozen=True)
class Series:
    """One curve. `color` is a number of the page's palette; a `faint` curve is noise behind a smoothed one."""

    label: str
    points: Points
    color: int = 1
    style: Style = "line"


def loss_series(train: Points, prior: Points, evaluation: Points, base: float | None, last_step: float) -> list[Series]:
    """The curves of a loss chart.

    Args:
        train: (step, loss).
        prior: steps on regularization data alone, whose loss is the distance from the base model.
        evaluation: eval loss.
        base: eval loss of the untouched base model.
    """
    series = [
        Series("each step", train, 1, "faint"),
        Series("training loss, smoothed", smoothed(train), 1),
        Series("distance from the base model", smoothed(prior), 3),
        Series("eval loss", evaluation, 2, "dots"),
    ]
    if base is not None and len(evaluation) > 1:
        series.append(Series("eval loss of the base model", [(0.0, base), (last_step, base)], 2, "dashed"))
    return series


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "optimizer step",
    size: tuple[int, int] = (640, 260),
    is_log: bool = False,
) -> Markup:
    """An `<svg>` element of several curves with a common scale; empty if there are no points.

    Args:
        title: for people who hear the page read.
        size: width, height.
        is_log: logarithmic y axis.
    """
    shown = [each for each in series if each.points]
    if not shown:
        return Markup()
    axes = Axes.around(shown, size, is_log)
    x_ticks = [
        (axes.x(tick), number_text(tick))
        for tick in nice_ticks(axes.left, axes.right, size[0] // 90)
        # The label of the axis stands at its end.
        if axes.x(tick) < size[0] - RIGHT - 6.5 * len(x_label) - 20
    ]
    y_ticks = [
        (axes.height_of(tick), number_text(10**tick if is_log else tick)) for tick in nice_ticks(axes.low, axes.high, 5)
    ]
    svg = render(
        "chart.svg",
        label=f"{title}: " + ", ".join(each.label for each in shown if each.label),
        axes=axes,
        edges={"left": LEFT, "right": size[0] - RIGHT, "bottom": size[1] - BOTTOM},
        x_label=x_label,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        curves=[_curve(each, axes) for each in shown],
    )
    return Markup(svg)


def legend(series: Sequence[Series]) -> list[Series]:
    """The curves that a legend names."""
    return [each for each in series if each.points and each.label and each.style != "faint"]


@dataclass(frozen=True)
class Axes:
    """Maps values to positions in the chart. With `is_log`, `low` and `high` are exponents of ten."""

    left: float
    right: float
    low: float
    high: float
    width: int
    height: int
    is_log: bool

    @classmethod
    def around(cls, shown: Sequence[Series], size: tuple[int, int], is_log: bool) -> Axes:
        """Room for every smooth curve and nearly all points of the noisy ones: a few outliers may touch the edge."""
        values: list[float] = []
        for each in shown:
            ordered = sorted(y for _, y in each.points)
            cut = len(ordered) // 50 if each.style == "faint" else 0
            values += ordered[cut : len(ordered) - cut] or ordered
        low, high = min(values), max(values)
        if is_log:
            low, high = (math.log10(max(value, SMALLEST)) for value in (low, high))
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 0.1
        bottom = max(0.0, low - margin) if low >= 0 and not is_log else low - margin
        steps = [x for each in shown for x, _ in each.points]
        left, right = min(steps), max(steps)
        return cls(left, right if right > left else left + 1, bottom, high + margin, *size, is_log)

    def x(self, value: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        return self.height_of(math.log10(max(value, SMALLEST)) if self.is_log else value)

    def height_of(self, tick: float) -> float:
        share = (min(max(tick, self.low), self.high) - self.low) / (self.high - self.low)
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * share


def _curve(series: Series, axes: Axes) -> dict[str, Any]:
    points = thinned(series.points)
    marks: Points = []
    if series.style == "dots":
        marks = points
    elif series.style != "faint":  # something to hover over, at a few places only: the page stays small
        marks = points[:: max(1, len(points) // MAX_HOVER_POINTS)]
    return {
        "color": series.color,
        "style": series.style,
        "path": " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points) if len(points) > 1 else "",
        "marks": [
            (f"{axes.x(x):.1f}", f"{axes.y(y):.1f}", f"{series.label} at {number_text(x)}: {number_text(y)}")
            for x, y in marks
        ],
    }


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """At most about `most` points: the lowest and the highest of each stretch, so that no peak is lost."""
    if len(points) <= most:
        return points
    length = -(-2 * len(points) // most)
    kept: list[tuple[float, float]] = []
    for first in range(0, len(points), length):
        stretch = points[first : first + length]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def smoothed(points: Points) -> list[tuple[float, float]]:
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


def number_text(value: float) -> str:
    """Three or four significant digits, as people write them: 0.0321, 4e-05, 12,000."""
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if value and abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4g}"
