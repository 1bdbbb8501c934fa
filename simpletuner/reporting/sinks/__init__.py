"""Where events go: the terminal, `metrics.jsonl`, `metrics.csv`, trackers, webhooks.

A sink imports its own packages when it needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

from simpletuner.config.options.reporting import ReportingOptions
from simpletuner.config.webhooks import Webhooks
from simpletuner.reporting.bus import Sink
from simpletuner.reporting.sinks.csv_table import CsvSink
from simpletuner.reporting.sinks.jsonl import JsonlSink
from simpletuner.reporting.sinks.tensorboard import TensorBoardSink
from simpletuner.reporting.sinks.terminal import terminal_sink
from simpletuner.reporting.trackers.background import TrackerSink
from simpletuner.reporting.trackers.base import Tracker
from simpletuner.reporting.trackers.readiness import trackers_of


def build_sinks(
    options: ReportingOptions,
    output_dir: Path,
    is_new: bool,
    stream: IO[str] | None = None,
    webhooks: Webhooks | None = None,
) -> list[Sink]:
    """The sinks of a main process: terminal, `metrics.jsonl` and `metrics.csv` always, trackers as `report_to` asks.

    Args:
        is_new: whether the run starts again rather than continues.
        stream: where the terminal's lines go; stdout where not given.
        webhooks: services that get events.
    """
    sinks: list[Sink] = [terminal_sink(stream), JsonlSink(output_dir), CsvSink(output_dir)]
    trackers, project = trackers_of(options), options.tracker_project_name
    if "tensorboard" in trackers:
        sinks.append(TensorBoardSink(output_dir))
    if webhooks is not None and webhooks.targets:
        from simpletuner.reporting.webhooks.sink import WebhookSink

        sinks.append(WebhookSink(webhooks, output_dir, run_name=options.tracker_run_name, is_new=is_new))
    if "wandb" in trackers:
        sinks.append(TrackerSink("W&B", _wandb_tracker, project))
    if "custom-tracker" in trackers and (name := options.custom_tracker):
        sinks.append(TrackerSink(name, lambda: _custom_tracker(name), project))
    return sinks


def _wandb_tracker() -> Tracker:
    from simpletuner.reporting.trackers.wandb import WandbTracker

    return WandbTracker()


def _custom_tracker(name: str) -> Tracker:
    from simpletuner.reporting.trackers.custom import load_custom_tracker

    return load_custom_tracker(name)()
