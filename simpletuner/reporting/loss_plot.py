"""The loss curve of a run as a PNG, from `metrics.jsonl`.

Training loss is noisy (each step sees other timesteps), so its smoothed course is plotted over the raw one. Steps on
regularization data alone have a loss of another kind (distance from the base model) and a curve of their own. The eval
loss, which sees the same noise each time, is plotted point by point and is the curve to trust.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.reporting.charts import smoothed
from simpletuner.reporting.sinks.jsonl import read_records
from simpletuner.storage import replacing_file
from simpletuner.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Points = list[tuple[int, float]]

WIDTH, HEIGHT, DPI = 1200, 720, 100
LEFT, RIGHT, TOP, BOTTOM = 96, 36, 88, 84
INK, MUTED, GRID = "#1f2933", "#6b7785", "#e6e9ed"
RAW, SMOOTH, PRIOR, EVAL = "#c5d7ee", "#2a6fbb", "#3a9d6e", "#d9582b"
# Fonts for run names in other scripts; matplotlib takes each character from the first that has it.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "PingFang SC", "Microsoft YaHei", "Arial Unicode MS")


@dataclass(frozen=True)
class Curves:
    """(step, loss) pairs in order of step; `prior` are the steps on regularization data alone."""

    run_name: str = ""
    train: Points = field(default_factory=list)
    prior: Points = field(default_factory=list)
    evaluation: Points = field(default_factory=list)


def plot_loss(metrics: Path, destination: Path) -> Path | None:
    """Plot the curves of `metrics` to `destination` (PNG); None if no loss was recorded.

    Raises:
        DataError, OSError: the file cannot be written.
    """
    curves = read_curves(metrics)
    if not (curves.train or curves.prior or curves.evaluation):
        return None
    from matplotlib import font_manager, rc_context, rcdefaults, rcParams
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    style: Any = {
        "font.family": [name for name in FONTS if name in installed],
        "text.color": INK,
        "text.parse_math": False,
    }
    with rc_context():
        rcdefaults()  # a `matplotlibrc` in the working folder may be a stranger's, and could start LaTeX
        rcParams.update(style)
        figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI)
        FigureCanvasAgg(figure)
        inner = (WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM)
        axes = figure.add_axes((LEFT / WIDTH, BOTTOM / HEIGHT, inner[0] / WIDTH, inner[1] / HEIGHT))
        _plot(axes, curves)
        destination.parent.mkdir(parents=True, exist_ok=True)
        with replacing_file(destination) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None})
    return destination


def read_curves(metrics: Path) -> Curves:
    """The losses of a metrics file. If a resume evaluated a step twice, the later record counts."""
    train: dict[int, float] = {}
    prior: dict[int, float] = {}
    evaluation: dict[int, float] = {}
    run_name = ""
    for record in read_records(metrics):
        kind = record.get("event")
        if kind == "run_started":
            run_name = str(record.get("run_name", ""))
        elif kind == "step_done" and isinstance(record.get("loss"), int | float):
            (prior if is_regularisation(record) else train)[int(record["step"])] = float(record["loss"])
        elif kind == "eval_done" and isinstance(record.get("pooled"), int | float):
            evaluation[int(record["step"])] = float(record["pooled"])
    return Curves(run_name, sorted(train.items()), sorted(prior.items()), sorted(evaluation.items()))


def is_regularisation(record: Mapping[str, Any]) -> bool:
    """As `StepDone.is_regularisation`, of a record of `metrics.jsonl`.

    Files of earlier versions do not say it: there the loss of the step is that of its regularization data.
    """
    if "is_regularisation" in record:
        return bool(record["is_regularisation"])
    return (record.get("extra") or {}).get("regularisation_loss") == record["loss"]


def _plot(axes: Axes, curves: Curves) -> None:
    from matplotlib.ticker import MaxNLocator

    if curves.train:
        axes.plot(*_columns(curves.train), color=RAW, linewidth=1)
    if curves.prior:
        course = smoothed(curves.prior)
        axes.plot(*_columns(course), color=PRIOR, label=f"distance from the base {course[-1][1]:.3f}")
    if curves.train:
        course = smoothed(curves.train)
        axes.plot(*_columns(course), color=SMOOTH, linewidth=2.2, label=f"training loss {course[-1][1]:.3f}")
    if curves.evaluation:
        dots: Any = {"marker": "o", "markersize": 7, "markeredgecolor": "white", "clip_on": False, "zorder": 3}
        axes.plot(*_columns(curves.evaluation), color=EVAL, label=_eval_label(curves.evaluation), **dots)
    steps = [step for points in (curves.train, curves.prior, curves.evaluation) for step, _ in points]
    axes.set_xlim(0, float(max(*steps, 1)))
    axes.set_ylim(*_range(curves))
    # The name of a run may be that of a folder, with line breaks.
    axes.set_title(printable(curves.run_name) or "loss", loc="left", fontsize=16, pad=34)
    axes.set_xlabel("optimizer step", color=MUTED)
    axes.set_ylabel("loss", color=MUTED)
    axes.xaxis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color=GRID)
    axes.tick_params(length=0, pad=9, colors=MUTED, labelsize=11)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(MUTED)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1.02), ncols=3, frameon=False, fontsize=11)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [float(step) for step, _ in points], [loss for _, loss in points]


def _eval_label(points: Points) -> str:
    first, last = points[0][1], points[-1][1]
    change = f", {100 * (last / first - 1):+.0f} %" if len(points) > 1 and first else ""
    return f"eval loss {last:.3f}{change}"


def _range(curves: Curves) -> tuple[float, float]:
    """Room for the smoothed and eval curves and nearly all raw steps; a few outliers may leave the chart."""
    raw = sorted(loss for _, loss in curves.train)
    cut = len(raw) // 100
    shown = raw[cut : max(1, len(raw) - cut)]
    courses = [*smoothed(curves.train), *smoothed(curves.prior), *curves.evaluation]
    values = [*shown, *(loss for _, loss in courses)]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or max(abs(high) * 0.1, 0.1)
    return max(0.0, low - margin) if low >= 0 else low - margin, high + margin
