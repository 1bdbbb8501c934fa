"""Where events go: the terminal, `metrics.jsonl`, TensorBoard. A sink imports its own packages when it needs them."""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from simpletuner.errors import ConfigError, Problem
from simpletuner.reporting.bus import Sink
from simpletuner.reporting.sinks.jsonl import JsonlSink
from simpletuner.reporting.sinks.tensorboard import TensorBoardSink
from simpletuner.reporting.sinks.terminal import terminal_sink

TRACKERS = ("tensorboard",)


def build_sinks(config: Any, output_dir: Path, stream: IO[str] | None = None) -> list[Sink]:
    """The sinks of a main process: the terminal and `metrics.jsonl` always, trackers as `report_to` asks.

    Args:
        config: read is `report_to`.
        stream: where the terminal's lines go; stdout where not given.

    Raises:
        ConfigError: a tracker that is not known.
    """
    sinks: list[Sink] = [terminal_sink(stream), JsonlSink(output_dir)]
    if "tensorboard" in tracker_names(config.report_to):
        sinks.append(TensorBoardSink(output_dir))
    return sinks


def tracker_names(report_to: str | None) -> set[str]:
    """The trackers that `report_to` names: a comma list, `all` or `none`; `simpletuner` is the metrics always kept."""
    asked = {word.strip().lower() for word in (report_to or "").split(",")} - {"", "none", "simpletuner"}
    if "all" in asked:
        asked = asked - {"all"} | set(TRACKERS)
    unknown = sorted(asked - set(TRACKERS))
    if unknown:
        raise ConfigError(
            Problem(
                f'"{", ".join(unknown)}" is not a tracker that this version can report to',
                key="report_to",
                allowed=f"{', '.join(TRACKERS)}, all, none, or a comma list",
                fix="metrics.jsonl in the output folder is always written; set report_to to one of these",
            )
        )
    return asked
