"""Where events go: the terminal, `metrics.jsonl`, TensorBoard, webhooks.

A sink imports its own packages when it needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO, Any

from simpletuner.config.webhooks import Webhooks
from simpletuner.reporting.bus import Sink
from simpletuner.reporting.sinks.jsonl import JsonlSink
from simpletuner.reporting.sinks.tensorboard import TensorBoardSink
from simpletuner.reporting.sinks.terminal import terminal_sink


def build_sinks(
    config: Any, output_dir: Path, stream: IO[str] | None = None, webhooks: Webhooks | None = None
) -> list[Sink]:
    """The sinks of a main process: the terminal and `metrics.jsonl` always, trackers as `report_to` asks.

    Args:
        config: read is `report_to`, whose names the configuration has checked.
        stream: where the terminal's lines go; stdout where not given.
        webhooks: services that are told.
    """
    sinks: list[Sink] = [terminal_sink(stream), JsonlSink(output_dir)]
    if "tensorboard" in config.report_to:
        sinks.append(TensorBoardSink(output_dir))
    if webhooks is not None and webhooks.targets:
        from simpletuner.reporting.webhooks.sink import WebhookSink

        sinks.append(WebhookSink(webhooks, output_dir))
    return sinks
