"""Whole runs with every tracker: the weights do not change by a bit, and the files hold the run."""

from __future__ import annotations

import csv
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from simpletuner.errors import DivergedError
from simpletuner.training import loop
from tests.runs import metrics, run_cli, train_here, write_run

pytestmark = pytest.mark.slow

TRACKER = """
from simpletuner.reporting.trackers.base import Tracker

class Slow(Tracker):
    def start(self, run):
        self.folder = run.output_dir

    def log_scalars(self, scalars, step):
        import time
        time.sleep(0.2)
        with (self.folder / "slow.txt").open("a") as file:
            file.write(f"{step} ")
"""


def test_every_tracker_at_once_changes_no_bit_and_each_has_the_run(tmp_path: Path, omnigen_folder: Path):
    environment = os.environ | {"WANDB_MODE": "offline", "HOME": str(tmp_path)}
    plain, watched = (
        write_run(tmp_path / name, omnigen_folder, max_train_steps=4, eval_steps_interval=2, **keys)
        for name, keys in (
            ("plain", {}),
            ("watched", {"report_to": "all", "custom_tracker": "slow_tracker:Slow", "tracker_project_name": "shapes"}),
        )
    )
    (watched / "slow_tracker.py").write_text(TRACKER)
    for folder in (plain, watched):
        done = run_cli(folder, "train", environment=environment)
        assert done.returncode == 0, done.stderr
    files = [folder / "output" / "checkpoint-4" / "pytorch_lora_weights.safetensors" for folder in (plain, watched)]
    one, other = (load_file(path) for path in files)
    assert one.keys() == other.keys()
    assert all(one[name].equal(other[name]) for name in one)

    output = watched / "output"
    with (output / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [record["loss"] for record in metrics(output, "step_done")]
    assert [float(row["train/loss"]) for row in rows if row["train/loss"]] == losses
    assert len([row for row in rows if row["loss/val/pooled"]]) == len(metrics(output, "eval_done"))
    assert [int(step) for step in dict.fromkeys((output / "slow.txt").read_text().split())] == [0, 1, 2, 3, 4]
    assert len(list((output / "wandb").glob("offline-run-*"))) == 1
    assert len(list((output / "logs").rglob("events.out.tfevents.*"))) == 1
    assert (output / "report.html").is_file()
    assert "wandb sync" in done.stdout
    assert "warning" not in done.stdout + done.stderr


def test_a_run_that_diverges_has_its_report(tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch):
    summarize = loop.summarize
    monkeypatch.setattr(loop, "summarize", lambda *arguments: replace(summarize(*arguments), loss=math.nan))
    folder = write_run(tmp_path / "run", omnigen_folder)
    with pytest.raises(DivergedError):
        train_here(folder)
    text = (folder / "output" / "report.html").read_text()
    assert '<span class="pill failed">' in text
    assert "were not finite" in text
    assert text.count("<img") == 12  # of the data; no image was generated

    # Nothing was saved, so the next start is a fresh one.
    monkeypatch.undo()
    train_here(folder)
    assert '<span class="pill finished">' in (folder / "output" / "report.html").read_text()
