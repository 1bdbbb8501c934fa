"""Which run of W&B a start goes on with; without W&B."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

from simpletuner.reporting.trackers.base import TrackedRun
from simpletuner.reporting.trackers.wandb import WandbTracker, tracked_id


def run(folder: Path, branch: str, start_step: int) -> TrackedRun:
    return TrackedRun("trial", None, folder, start_step, 10, run_id="run", branch=branch)


def test_a_start_of_the_same_branch_goes_on_and_a_new_branch_or_run_is_a_new_one(tmp_path: Path):
    first = tracked_id(run(tmp_path, "a", 0))
    assert tracked_id(run(tmp_path, "a", 4)) == first
    second = tracked_id(run(tmp_path, "b", 2))
    assert second != first
    assert json.loads((tmp_path / "wandb_run.json").read_text()) == {"id": second, "run": "run", "branch": "b"}
    assert tracked_id(run(tmp_path, "b", 0)) != second


def test_the_note_of_an_earlier_version_is_gone_on_with_and_a_damaged_one_is_replaced(tmp_path: Path):
    (tmp_path / "wandb_run.json").write_text('{"id": "0a1b2c3d"}')
    assert tracked_id(run(tmp_path, "a", 4)) == "0a1b2c3d"
    for damaged in ("{", "[]", "{}"):
        (tmp_path / "wandb_run.json").write_text(damaged)
        assert tracked_id(run(tmp_path, "a", 4))


def test_a_step_that_w_and_b_has_already_is_not_sent_again():
    """W&B takes steps that only grow; a resumed run repeats those after its checkpoint."""
    sent: list[int] = []
    tracker = WandbTracker()
    tracker._run, tracker._first_step = SimpleNamespace(log=lambda values, step: sent.append(step)), 5
    for step in (3, 4, 5, 6):
        tracker.log_scalars({"train/loss": 0.5}, step)
    assert sent == [5, 6]
