"""Curves as SVG inside the page: sharp at any size and on paper, in the page's colours, with values to hover over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

from simpletuner.reporting.loss_plot import nice_ticks
from simpletuner.reporting.report.record import Points

HEIGHT = 260
WIDTH, WIDE = 640, 1240
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 30
MOST_POINTS = 320

Look = Literal["line", "faint", "dots", "dashed"]


@dataclass(frozen=True)
class Series:
    """One curve: `look` is how it is drawn, `colour` a number of the page's palette."""

    label: str
    points: Points
    colour: int = 1
    look: Look = "line"


def chart(
    title: str, series: Sequence[Series], x_label: str = "optimizer step", note: str = "", is_wide: bool = False
) -> str:
    """A figure of several curves with a common scale, over the whole page if `is_wide`; empty without any points."""
    shown = [each for each in series if each.points]
    if not shown:
        return ""
    axes = _axes(shown, WIDE if is_wide else WIDTH)
    body = "".join((axes.frame(x_label), *(_draw(each, axes) for each in shown)))
    label = escape(f"{title}: " + ", ".join(each.label for each in shown if each.label))
    svg = f'<svg viewBox="0 0 {axes.width} {HEIGHT}" role="img" aria-label="{label}">{body}</svg>'
    notes = f'<p class="muted">{escape(note)}</p>' if note else ""
    wide = " wide" if is_wide else ""
    caption = f"<figcaption>{escape(title)}{_legend(shown)}</figcaption>"
    return f'<figure class="card chart{wide}">{caption}{svg}{notes}</figure>'


@dataclass(frozen=True)
class _Axes:
    left: float
    right: float
    low: float
    high: float
    width: int

    def x(self, value: float) -> float:
        return LEFT + (self.width - LEFT - RIGHT) * (value - self.left) / (self.right - self.left)

    def y(self, value: float) -> float:
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    def frame(self, x_label: str) -> str:
        parts = []
        for tick in nice_ticks(self.low, self.high, 5):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number_text(tick)}</text>')
        for tick in nice_ticks(self.left, self.right, self.width // 90):
            x = self.x(tick)
            if x < self.width - RIGHT - 6.5 * len(x_label) - 20:  # the label of the axis stands at its end
                y = HEIGHT - BOTTOM + 18
                parts.append(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{number_text(tick)}</text>')
        y = HEIGHT - BOTTOM
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{self.width - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{self.width - RIGHT}" y="{y + 18}" text-anchor="end">{escape(x_label)}</text>')
        return "".join(parts)


def _axes(shown: Sequence[Series], width: int) -> _Axes:
    """Room for every smooth curve and for nearly all of the noisy ones: a few wild steps may touch the edge."""
    values: list[float] = []
    for each in shown:
        ordered = sorted(y for _, y in each.points)
        cut = len(ordered) // 50 if each.look == "faint" else 0
        values += ordered[cut : len(ordered) - cut] or ordered
    steps = [x for each in shown for x, _ in each.points]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 0.1
    bottom = max(0.0, low - margin) if low >= 0 else low - margin
    left, right = min(steps), max(steps)
    return _Axes(left, right if right > left else left + 1, bottom, high + margin, width)


def _draw(series: Series, axes: _Axes) -> str:
    points = thinned(series.points)
    path = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
    curve = f'<polyline class="c{series.colour} {series.look}" points="{path}"/>' if len(points) > 1 else ""
    if series.look == "faint":
        return curve
    # Something to hover over, at a few places only: the page stays small.
    marks = points if series.look == "dots" else points[:: max(1, len(points) // 40)]
    radius = 3.5 if series.look == "dots" else 5
    kind = "dot" if series.look == "dots" else "touch"
    dots = "".join(
        f'<circle class="c{series.colour} {kind}" cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}" r="{radius}">'
        f"<title>{escape(series.label)} at {number_text(x)}: {number_text(y)}</title></circle>"
        for x, y in marks
    )
    return curve + dots


def thinned(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about `most` points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return points
    length = -(-2 * len(points) // most)
    kept: Points = []
    for first in range(0, len(points), length):
        stretch = points[first : first + length]
        ends = {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
        kept += sorted(ends)
    return kept


def _legend(shown: Sequence[Series]) -> str:
    named = [each for each in shown if each.look != "faint" and each.label]
    if not named:
        return ""
    items = "".join(f'<span><i class="c{each.colour} {each.look}"></i>{escape(each.label)}</span>' for each in named)
    return f'<span class="legend">{items}</span>'


def number_text(value: float) -> str:
    """Three or four digits that count, as people write them: 0.0321, 4e-05, 12,000."""
    if value == int(value) and abs(value) < 1e7:
        return f"{int(value):,}"
    if value and abs(value) < 1e-3:
        return f"{value:.2g}"
    return f"{value:.4g}"
