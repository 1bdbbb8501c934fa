from __future__ import annotations

import json
from pathlib import Path

from simpletuner.reporting.events import CheckpointSaved, EvalDone, PicturesMade, SavedPicture, event_name, to_record


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


def test_pictures_inside_an_event_become_plain_objects():
    picture = SavedPicture(Path("x/a.png"), "a", "a cat", 64, 32, 7, "live")
    [plain] = to_record(PicturesMade(1, (picture,)))["pictures"]
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
