"""The numbers of an event under the names that dashboards show them by: the same in each tracker.

A name's first part is the panel that it is shown in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

from simpletuner.reporting.events import (
    EvalDone,
    Event,
    ImagesScored,
    LossBySigma,
    SavedImage,
    StepDone,
    event_name_of,
)

SHOWN = (StepDone, EvalDone, ImagesScored, LossBySigma)


def scalars(event: Event) -> dict[str, float]:
    """Numbers by name; empty for events without any. Their step is `event.step`."""
    if isinstance(event, StepDone):
        return _of_step(event)
    if isinstance(event, EvalDone):
        return _of_evaluation(event)
    if isinstance(event, ImagesScored):
        each = {f"{event.metric}/{name}": score for name, score in event.scores.items()}
        return {f"{event.metric}/mean": event.mean, **each}
    if isinstance(event, LossBySigma):
        return {f"train_loss_by_sigma/{low:.1f}-{high:.1f}": loss for low, high, loss, _ in event.bins}
    return {}


def image_name(image: SavedImage) -> str:
    """`live/cat_1024x768_1`: which weights, which prompt, width and height, and the number of a further image."""
    number = f"_{image.index}" if image.index else ""
    return f"{image.kind}/{image.shortname}_{image.width}x{image.height}{number}"


def _of_step(event: StepDone) -> dict[str, float]:
    named = {
        "train/loss": event.loss,
        "train/learning_rate": event.learning_rate,
        "train/grad_norm": event.grad_norm,
        "train/epoch": event.epoch,
        "speed/seconds_per_step": event.seconds,
        "speed/samples_per_second": event.samples / event.seconds if event.seconds > 0 else None,
        "memory/gb": event.memory_gb,
        **{f"train/{name}": value for name, value in event.extra.items()},
    }
    return {name: value for name, value in named.items() if value is not None}


def _of_evaluation(event: EvalDone) -> dict[str, float]:
    losses = {f"loss/val/{dataset}": loss for dataset, loss in event.losses.items()}
    by_quantile = {f"loss_by_quantile/{quantile:.2f}": loss for quantile, loss in event.per_quantile}
    base = {} if event.reference is None else {"loss/val/base_model": event.reference}
    return {**losses, "loss/val/pooled": event.pooled, **base, **by_quantile}


def record_scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """As `scalars`, of an event as `metrics.jsonl` holds it; empty where the record is of another version."""
    kind = next((kind for kind in SHOWN if event_name_of(kind) == record.get("event")), None)
    if kind is None:
        return {}
    known = {field.name for field in dataclasses.fields(kind)}
    try:
        return {name: float(value) for name, value in scalars(kind(**_numbers(record, known))).items()}
    except (TypeError, ValueError, AttributeError):  # damaged: text where a number or a table was
        return {}


def _numbers(value: Any, names: Collection[str] | None = None) -> Any:
    """The record with numbers that JSON cannot hold ("nan", "inf") as numbers again."""
    if isinstance(value, Mapping):
        return {name: _numbers(item) for name, item in value.items() if names is None or name in names}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if value in ("nan", "inf", "-inf") else value
