"""How a run begins in its folder: what it goes on from, what is moved aside, what is told (`tests/toy.py`)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpletuner import storage
from simpletuner.distributed.process_group import SINGLE_PROCESS
from simpletuner.errors import ConfigError
from simpletuner.training import start as start_module
from simpletuner.training.checkpoint import load_checkpoint
from simpletuner.training.earlier_runs import write_run_history
from simpletuner.training.loop import run_training
from simpletuner.training.run_history import RunHistory
from simpletuner.training.start import LATER, Start, begin_in_folder, plan_start
from tests.configs import config_of
from tests.toy import load_toy, toy_run

ONE = {"a": (1.0, 3.0)}
EACH = {"max_train_steps": 3, "checkpoint_step_interval": 1, "checkpoints_total_limit": 0}


def planned(folder: Path, resume: str | None, output: Path | None = None, **options) -> Start:
    loaded = load_toy(folder, **EACH | {"resume_from_checkpoint": resume} | options)
    return plan_start(loaded, output or folder / "output", SINGLE_PROCESS)


@pytest.fixture
def trained(tmp_path):
    run, _ = toy_run(tmp_path, ONE, **EACH)
    run_training(run)
    write_run_history(tmp_path / "output", run.session.checkpoints.history)
    return run


def test_a_run_goes_on_from_its_newest_checkpoint_and_moves_nothing(tmp_path, trained):
    start = planned(tmp_path, "latest")
    assert (start.resume_from, start.step, start.is_own, start.moves) == (
        *(tmp_path / "output/checkpoint-3", 3),
        *(True, False),
    )
    assert start.history.run_id == trained.session.checkpoints.history.run_id
    assert start.notices == ()


def test_going_back_begins_a_branch_and_says_so(tmp_path, trained):
    start = planned(tmp_path, str(tmp_path / "output/checkpoint-2"))
    run_id = trained.session.checkpoints.history.run_id
    assert (start.step, start.is_own, start.moves) == (2, True, True)
    assert start.history.run_id == run_id
    assert not start.history.owns(trained.session.checkpoints.history.mark, 3)
    assert start.notices[-1] == f"goes back to checkpoint-2: a new branch of run {run_id} begins after step 2; {LATER}"


def test_a_run_goes_back_where_only_its_final_weights_are_of_a_later_step(tmp_path, trained):
    shutil.rmtree(tmp_path / "output/checkpoint-3")
    assert not planned(tmp_path, "latest").moves
    adapter = tmp_path / "output/pytorch_lora_weights.safetensors"
    storage.save_tensors(adapter, {"weight": torch.zeros(1)}, {"global_step": "3"})
    start = planned(tmp_path, "latest")
    assert (start.step, start.is_own, start.moves) == (2, True, True)


def test_the_checkpoint_of_another_folder_begins_a_run_of_its_own_at_its_step(tmp_path, trained):
    path, other = tmp_path / "output/checkpoint-2", tmp_path / "other"
    other.mkdir()
    start = planned(tmp_path, str(path), other)
    assert (start.resume_from, start.step, start.is_own, start.moves) == (path, 2, False, True)
    assert start.notices == (f"starts from the checkpoint of another run: {path}; {LATER}",)
    assert start.history.run_id != trained.session.checkpoints.history.run_id
    assert [branch.after_step for branch in start.history.branches] == [2]
    assert planned(tmp_path, "latest", other).step == 0


def test_a_fresh_start_is_another_run_that_moves_all_and_keeps_the_reports_of_its_data(tmp_path, trained):
    (tmp_path / "output/dataset_report.json").write_bytes(b"{}")
    start = planned(tmp_path, "")
    assert (start.resume_from, start.step, start.is_own, start.moves) == (None, 0, False, True)
    assert start.history.run_id != trained.session.checkpoints.history.run_id
    assert dict(start.reports) == {"dataset_report.json": b"{}"}


def test_another_optimizer_is_refused_before_anything_is_loaded(tmp_path, trained):
    with pytest.raises(ConfigError, match="optimizer adamw → torch-adamw"):
        planned(tmp_path, "latest", optimizer="torch-adamw")


def test_another_rank_is_refused_with_both(tmp_path, trained):
    rank = json.loads((tmp_path / "output/checkpoint-3/config.json").read_text())["lora_rank"]
    options = {"lora_type": "standard"}
    standard, _ = toy_run(tmp_path / "standard", ONE, **EACH, **options)
    run_training(standard)
    assert planned(tmp_path / "standard", "latest", **options).step == 3
    with pytest.raises(ConfigError, match=f"was trained with rank {rank}, the configuration says {rank + 1}") as caught:
        planned(tmp_path / "standard", "latest", **options, lora_rank=rank + 1)
    assert caught.value.problems[0].key == "lora_rank"


def test_what_lies_after_the_step_is_moved_and_the_record_of_eval_losses_is_cut(tmp_path, trained):
    output = tmp_path / "output"
    (output / "dataset_report.json").write_text("[]")
    start = planned(tmp_path, str(tmp_path / "output/checkpoint-2"))
    run, _ = toy_run(tmp_path, ONE, **EACH)
    load_checkpoint(run, output / "checkpoint-2")
    run.progress.eval_losses = {1: 0.5}
    [line] = begin_in_folder(run, start)
    assert "earlier-runs" in line
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert [path.name for path in output.glob("earlier-runs/*/checkpoint-*")] == ["checkpoint-3"]
    assert [path.parent.name for path in tmp_path.rglob("dataset_report.json")] == ["output"]  # the run's own still
    assert json.loads((output / "eval_losses.json").read_text())["losses"] == {"1": 0.5}


def test_a_start_that_moves_nothing_writes_whose_the_folder_is_and_no_more(tmp_path, trained):
    output = tmp_path / "output"
    (output / "run_history.json").unlink()
    before = {path.name for path in output.iterdir()}
    start = planned(tmp_path, "latest")
    [line] = start.notices
    assert "run_history.json is missing" in line
    assert begin_in_folder(trained, start) == []
    assert {path.name for path in output.iterdir()} - before == {"run_history.json"}
    assert not (output / "earlier-runs").exists()


def test_a_checkpoint_that_is_a_link_to_another_disk_is_still_this_run_s(tmp_path, trained):
    newest = tmp_path / "output/checkpoint-3"
    newest.rename(tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    start = planned(tmp_path, "latest")
    assert (start.resume_from, start.is_own, start.moves) == (newest, True, False)


def test_going_back_moves_a_later_checkpoint_whose_manifest_is_damaged_too(tmp_path, trained):
    """It would be replaced by the new one of its step, and nothing is deleted that a run made."""
    for step in (2, 3):
        (tmp_path / f"output/checkpoint-{step}/manifest.json").write_text("{")
    start = planned(tmp_path, str(tmp_path / "output/checkpoint-1"))
    assert (start.is_own, start.moves) == (True, True)
    trained.progress.global_step = 1
    begin_in_folder(trained, start)
    assert sorted(path.name for path in tmp_path.glob("output/earlier-runs/*/checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]


def test_a_resume_is_compared_as_memory_chose_for_its_checkpoint(tmp_path, monkeypatch) -> None:
    """Else a run whose settings were chosen could not go on where another machine has less memory."""
    seen: list[Any] = []
    answers = {"read_state": {"identity": {"fixed": {}}}, "keep_choice": "as it was chosen"}
    for name, answer in answers.items():
        monkeypatch.setattr(start_module, name, lambda *given, answer=answer: answer)
    monkeypatch.setattr(start_module, "fixed_settings", lambda loaded: loaded)
    monkeypatch.setattr(start_module, "refuse_changes", lambda saved, current, path: seen.append(current))
    storage.write_json(tmp_path / "config.json", {})
    loaded: Any = SimpleNamespace(config=config_of(model_type="full"))
    start_module._refuse_other_options(loaded, tmp_path)
    assert seen == ["as it was chosen"]


@pytest.mark.parametrize("is_own", [False, True])
def test_all_processes_know_whose_checkpoint_it_is(tmp_path, monkeypatch, is_own: bool) -> None:
    planned = Start(RunHistory.new(), tmp_path, is_own)
    monkeypatch.setattr(start_module, "_plan_here", lambda *given: planned)
    said: list[Any] = []
    main: Any = SimpleNamespace(is_main=True, size=2, rank=0, from_main=lambda value: said.append(value) or value)
    other: Any = SimpleNamespace(is_main=False, size=2, rank=1, from_main=lambda value: said[0])
    loaded: Any = None
    assert plan_start(loaded, tmp_path, main) is planned
    found = plan_start(loaded, tmp_path, other)
    assert (found.history, found.resume_from, found.is_own) == (planned.history, tmp_path, is_own)
