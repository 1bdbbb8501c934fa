"""Events as records: names, strict JSON, and the scalars of a step."""

from __future__ import annotations

import json
from pathlib import Path

from simpletuner.reporting.events import (
    CheckpointSaved,
    EvalDone,
    ImagesMade,
    SavedImage,
    StepDone,
    event_name,
    to_record,
)
from simpletuner.reporting.scalars import scalars


def test_events_are_named_after_their_class():
    assert event_name(CheckpointSaved(1, Path("a"))) == "checkpoint_saved"


def test_records_are_strict_json_even_where_numbers_are_not_finite():
    record = to_record(EvalDone(3, {"a": float("nan")}, float("inf"), ((0.25, 0.5),)))
    assert json.loads(json.dumps(record, allow_nan=False)) == {
        "event": "eval_done",
        "step": 3,
        "losses": {"a": "nan"},
        "pooled": "inf",
        "per_quantile": [[0.25, 0.5]],
        "seconds": 0.0,
        "reference": None,
        "reference_per_quantile": [],
    }


def test_images_inside_an_event_become_plain_objects():
    image = SavedImage(Path("x/a.png"), "a", "a cat", 64, 32, 7, "live")
    [plain] = to_record(ImagesMade(1, (image,)))["pictures"]
    assert plain == {
        "path": "x/a.png",
        "shortname": "a",
        "prompt": "a cat",
        "width": 64,
        "height": 32,
        "seed": 7,
        "kind": "live",
        "index": 0,
    }


def test_the_numbers_of_a_step_have_their_names():
    event = StepDone(3, 10, 0.5, 1e-4, 2.0, 4.0, 8, 2, memory_gb=6.0, extra={"ema_decay": 0.9})
    assert scalars(event) == {
        "train/loss": 0.5,
        "train/learning_rate": 1e-4,
        "train/grad_norm": 2.0,
        "train/epoch": 2,
        "speed/seconds_per_step": 4.0,
        "speed/samples_per_second": 2.0,
        "memory/gb": 6.0,
        "train/ema_decay": 0.9,
    }
