from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simpletuner.commands.verify_resume import compare_runs, shortened, verify_resume
from simpletuner.errors import ConfigError, DataError
from tests.runs import load_here, write_run


def make_run(folder: Path, weight: float = 1.0, losses: tuple[float, ...] = (0.5, 0.25), **metadata: str) -> Path:
    """An output folder with one checkpoint of step 2."""
    checkpoint = folder / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    save_file({"a": torch.tensor([weight, 2.0]), "b": torch.zeros(3)}, checkpoint / "w.safetensors", metadata)
    records = [{"event": "step_done", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_equal_runs_have_no_difference_and_say_what_was_compared(tmp_path: Path):
    found = compare_runs(make_run(tmp_path / "a"), make_run(tmp_path / "b"), 2)
    assert (found.lines, found.num_files, found.num_losses) == ((), 1, 2)


def test_every_kind_of_difference_is_found(tmp_path: Path):
    one = make_run(tmp_path / "one")
    assert compare_runs(one, make_run(tmp_path / "weight", weight=1.5), 2).lines == (
        "w.safetensors: 1 of 2 tensors, by 0.5 at most",
    )
    assert compare_runs(one, make_run(tmp_path / "loss", losses=(0.5, 0.26)), 2).lines == (
        "the loss of step 2 and of 0 others",
    )
    assert compare_runs(one, make_run(tmp_path / "short", losses=(0.5,)), 2).lines
    assert "header" in compare_runs(one, make_run(tmp_path / "header", note="x"), 2).lines[0]
    other = make_run(tmp_path / "file")
    (other / "checkpoint-2" / "ema.safetensors").write_bytes(b"x")
    assert compare_runs(one, other, 2).lines == ("ema.safetensors is only in one of them",)


def test_the_proof_changes_nothing_that_decides_the_weights_and_tells_nobody(tmp_path: Path, omnigen_folder: Path):
    loaded = load_here(write_run(tmp_path / "run", omnigen_folder, report_to="tensorboard", use_ema=True))
    short = shortened(loaded, tmp_path / "elsewhere", 9)
    before, after = loaded.resolved(), short.resolved()
    assert {key for key in before if before[key] != after[key]} == {
        *("output_dir", "max_train_steps", "checkpoint_step_interval", "checkpoints_total_limit"),
        *("eval_loss_disable", "report_to"),
    }
    assert not short.webhooks.targets


def test_a_run_of_several_processes_is_refused_by_name(tmp_path: Path, omnigen_folder: Path):
    loaded = load_here(write_run(tmp_path / "run", omnigen_folder), "--num_processes=2")
    with pytest.raises(ConfigError, match="num_processes"):
        verify_resume(loaded, (), 6, print)


@pytest.mark.slow
def test_a_killed_run_of_the_tiny_model_is_proved_equal(tmp_path: Path, omnigen_folder: Path, monkeypatch):
    folder = write_run(tmp_path / "run", omnigen_folder, use_ema=True, num_train_epochs=0)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CONFIG_PATH", "config.json")
    said: list[str] = []
    assert verify_resume(load_here(folder), (), 30, said.append)
    assert "went on after step" in said[2]
    assert said[-1].startswith("equal, bit for bit")
    assert "30 losses" in said[-1]
    assert [path.name for path in folder.iterdir() if path.name.startswith("verify-resume-")] == []


@pytest.mark.slow
def test_a_run_that_fails_by_itself_is_told_with_its_reason(tmp_path: Path, omnigen_folder: Path, monkeypatch):
    folder = write_run(tmp_path / "run", omnigen_folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CONFIG_PATH", "config.json")
    loaded = load_here(folder)
    for path in (folder / "pictures").glob("*.png"):
        path.write_bytes(b"torn")
    with pytest.raises(DataError, match="failed by itself"):
        verify_resume(loaded, (), 6, print)
