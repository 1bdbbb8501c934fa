"""Events as records: names, strict JSON, and the scalars of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner.reporting.events import (
    CheckpointSaved,
    EvalDone,
    ImagesMade,
    ImagesScored,
    LossBySigma,
    SavedImage,
    StepDone,
    event_name,
    to_record,
)
from simpletuner.reporting.scalars import image_name, record_scalars, scalars


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


def test_the_numbers_of_evaluations_scores_and_noise_levels_have_their_names():
    evaluation = EvalDone(3, {"cats": 0.5, "dogs": 0.25}, 0.375, ((0.1, 0.75), (0.25, 0.125)), reference=0.625)
    assert scalars(evaluation) == {
        "loss/val/cats": 0.5,
        "loss/val/dogs": 0.25,
        "loss/val/pooled": 0.375,
        "loss/val/base_model": 0.625,
        "loss_by_quantile/0.10": 0.75,
        "loss_by_quantile/0.25": 0.125,
    }
    assert scalars(EvalDone(3, {}, 0.5)) == {"loss/val/pooled": 0.5}
    assert scalars(ImagesScored(3, "clip", {"live/cat": 20.0, "base/cat": 30.0}, 20.0)) == {
        "clip/mean": 20.0,
        "clip/live/cat": 20.0,
        "clip/base/cat": 30.0,
    }
    bins = ((0.0, 0.25, 0.5, 7.0), (0.25, 0.5, 0.125, 3.0))
    assert scalars(LossBySigma(9, 1, bins)) == {
        "train_loss_by_sigma/0.0-0.2": 0.5,
        "train_loss_by_sigma/0.2-0.5": 0.125,
    }


def test_a_step_that_took_no_time_has_no_pace_and_missing_numbers_no_names():
    assert scalars(StepDone(1, 2, 0.5, 1e-4, None, 0.0, 8, 1)) == {
        "train/loss": 0.5,
        "train/learning_rate": 1e-4,
        "train/epoch": 1,
        "speed/seconds_per_step": 0.0,
    }


@pytest.mark.parametrize(("index", "name"), [(0, "live/cat_64x32"), (1, "live/cat_64x32_1")])
def test_an_image_is_called_by_weights_prompt_size_and_number(index: int, name: str):
    assert image_name(SavedImage(Path("a.png"), "cat", "a cat", 64, 32, 7, "live", index)) == name


def test_records_give_the_numbers_that_their_events_gave():
    for event in (
        StepDone(3, 10, float("nan"), 1e-4, 2.0, 4.0, 8, 2, extra={"ema_decay": 0.9}),
        EvalDone(3, {"a": 0.5}, float("inf"), ((0.25, 0.5),), reference=0.5),
        LossBySigma(9, 1, ((0.0, 0.5, 0.25, 7.0),)),
    ):
        record = json.loads(json.dumps(to_record(event)))
        assert str(record_scalars(record | {"unknown": 1})) == str({k: float(v) for k, v in scalars(event).items()})
    assert record_scalars({"event": "eval_done", "step": 1, "losses": "damaged", "pooled": 1.0}) == {}
    assert record_scalars({"event": "checkpoint_saved"}) == {}
