"""Every event that a raw webhook can get fits the published schema, by the reference implementation of JSON Schema."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from scripts.fill_pages import PAGES, event_schema_text
from simpletuner.config.webhooks import Webhook
from simpletuner.reporting import events
from simpletuner.reporting.events import Event, LossBySigma, PhaseProgress, SavedImage, StepDone
from simpletuner.reporting.webhooks.encoding import raw_event
from simpletuner.reporting.webhooks.images import Attachment
from simpletuner.reporting.webhooks.messages import CurvePoint, progress_message, words_for
from tests.events import step_done

TARGET = Webhook(webhook_type="raw", callback_url=SecretStr("http://localhost/"))
IMAGE = SavedImage(Path("cat.png"), "cat", "a cat", 64, 48, None, "base")
EXAMPLES: list[Event] = [
    events.RunStarted("run", Path("out"), 10, 5, {"model": "Tiny"}, {"seed": 1}),
    events.PhaseStarted("encoding"),
    events.PhaseStarted("encoding", 4),
    events.PhaseDone("encoding", 1.5, "4 images"),
    events.EvalDone(5, {"held-out": float("nan")}, 0.5, ((0.1, 0.5), (0.9, 0.25)), 1.0, 0.75),
    events.LossBySigma(5, 1, ((0.0, 0.1, 0.5, 4.0),)),
    events.CheckpointSaved(5, Path("out/checkpoint-5")),
    events.CheckpointSaved(5, Path("out/checkpoint-best"), 0.5),
    events.ImagesMade(5, (IMAGE,) * 12),
    events.PreviewMade(5, IMAGE, 5, 20, 0.75),
    events.ImagesScored(5, "clip", {"live cat": 0.25}, 0.25),
    events.Notice("warning", "odd \udcff name"),
    events.RunFinished(10, 12.0, {"adapter": Path("a.safetensors")}, ("simpletuner generate",)),
    events.RunFailed(5, "no", 3),
    events.RunFailed(5, "stopped", 143),
]
STEP = step_done(3, loss=float("inf"), seconds=0.5, memory_gb=1.5, extra={"ema_decay": 0.9})


def published() -> dict[str, Any]:
    return json.loads((PAGES / "webhook_events.schema.json").read_text(encoding="utf-8"))


def sent() -> list[dict[str, Any]]:
    """What a receiver reads of each example; images are there, or not."""
    messages = [message for event in EXAMPLES for message in words_for(event, "run")]
    curve = [CurvePoint(3, float("inf"), 1e-4, None, 0.5)]
    messages += [progress_message(STEP, "run", curve), progress_message(PhaseProgress("encoding", 2), "run", [])]
    attachment = Attachment("cat.png", "image/png", b"png")
    found = []
    for index, message in enumerate(messages):
        attachments = [attachment if index % 2 else None for _ in message.images]
        found.append(json.loads(json.dumps(raw_event(TARGET, message, attachments, None), allow_nan=False)))
    return found


def test_the_published_schema_is_the_program_s() -> None:
    text = (PAGES / "webhook_events.schema.json").read_text(encoding="utf-8")
    assert text == event_schema_text(), "write it again: python scripts/fill_pages.py"


def test_every_event_fits_the_published_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(published())
    for event in sent():
        faults = [f"{fault.json_path}: {fault.message}" for fault in validator.iter_errors(event)]
        assert faults == [], event["type"]
    assert {event["type"] for event in sent()} == set(published()["properties"]["type"]["enum"])


@pytest.mark.parametrize("change", [{"type": "x"}, {"data": {}}, {"images": ["http://x"]}, {"timestamp": None}])
def test_the_schema_refuses_what_is_no_event(change: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(published())
    event = next(event for event in sent() if event["type"] == "validation.preview")
    assert not list(validator.iter_errors(event))
    assert list(validator.iter_errors(event | change))


def test_every_event_of_a_run_is_reported() -> None:
    """A new event needs words, or a reason here."""
    silent = {StepDone, PhaseProgress}  # `progress_message` words them
    silent |= {LossBySigma}  # a curve for trackers, and no news
    kinds = {kind for kind in vars(events).values() if isinstance(kind, type) and issubclass(kind, Event)} - {Event}
    assert all(dataclasses.is_dataclass(kind) for kind in kinds)
    assert {type(event) for event in EXAMPLES} | silent == kinds


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (143, ("training.status", "warning", "interrupted", "training was interrupted at step 5")),
        (130, ("training.status", "warning", "interrupted", "training was interrupted at step 5")),
        (3, ("error", "critical", "failed", "training failed at step 5")),
    ],
)
def test_a_run_that_was_asked_to_stop_is_no_error(code: int, expected: tuple[str, ...]) -> None:
    [message] = words_for(events.RunFailed(5, "why", code), "run")
    assert (message.type, message.severity, message.data["status"], message.title) == expected


def test_the_resolved_configuration_is_not_sent() -> None:
    assert not any("options" in event["data"] for event in sent())
