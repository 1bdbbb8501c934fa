"""{fresh, rewind, path of another run, latest} x {same, other settings}, with every sink at once: each file in the
folder belongs to the run that the log names."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import HfApi
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simpletuner import storage
from simpletuner.hub import publisher
from simpletuner.reporting.report.record import read_run
from simpletuner.training.run_history import Mark, RunHistory, history_of
from tests.hub_uploads import TOKEN, upload_hub
from tests.runs import metrics, train_here, write_run

pytestmark = pytest.mark.ci

WEIGHTS = "pytorch_lora_weights.safetensors"
SCRIPT = "import sys, pathlib; pathlib.Path(sys.argv[1], 'asked.txt').open('a').write(sys.argv[2] + chr(10))"
OPTIONS = {
    "max_train_steps": 4,
    "checkpoint_step_interval": 2,
    "checkpoints_total_limit": 5,
    "eval_steps_interval": 2,
    "use_ema": True,
    "report_to": "tensorboard,wandb",
    "push_to_hub": True,
    "hub_model_id": "me/stars",
    "validation_disable": False,
    "validation_method": "external-script",
    "validation_step_interval": 2,
}


class FakeWandb(ModuleType):
    """What W&B gets, by id; it takes no step twice. (`test_wandb.py` asks W&B itself.)"""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.steps: dict[str, list[int]] = {}

    def Settings(self, **options: Any) -> dict[str, Any]:
        return options

    def init(self, id: str, dir: Path, **options: Any) -> Any:
        taken = self.steps.setdefault(id, [])

        def log(values: dict[str, Any], step: int) -> None:
            if "train/loss" in values:
                taken.append(step)

        return SimpleNamespace(
            step=max(taken, default=-1) + 1,
            settings=SimpleNamespace(mode="offline"),
            dir=str(dir / "wandb" / id / "files"),
            log=log,
            finish=lambda exit_code: None,
        )


STARTS = ("none", "checkpoint-2", "other", "latest")


@pytest.mark.parametrize("settings", ["same", "other"])
@pytest.mark.parametrize("start", STARTS)
def test_each_file_belongs_to_the_run_that_the_log_names(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch, start: str, settings: str
):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = f"{sys.executable} {script} {{output_dir}} {{local_checkpoint_path}}"
    with upload_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(publisher, "make_api", lambda: HfApi(endpoint=hub.url, token=TOKEN))
        monkeypatch.setattr(publisher, "GIVE_UP_SECONDS", 5.0)
        wandb = FakeWandb()
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        folder = write_run(tmp_path / "run", omnigen_folder, **OPTIONS, validation_external_script=command)
        output = train_here(folder)
        first = metrics(output, "run_started")[-1]
        first_id = storage.read_json(output / "wandb_run.json")["id"]
        other = tmp_path / "other"
        if start == "other":
            quiet = {**OPTIONS, "report_to": "none", "push_to_hub": False, "validation_disable": True, "seed": 9}
            quiet["validation_method"] = "simpletuner-local"
            start = str(train_here(write_run(other, omnigen_folder, **quiet)) / "checkpoint-2")
        arguments = [f"--resume_from_checkpoint={start}", "--max_train_steps=6"]
        train_here(folder, *arguments, *(["--learning_rate=0.001"] if settings == "other" else []))
        repo = hub.repos["me/stars"]

    started = metrics(output, "run_started")[-1]
    run, branch = started["run_id"], started["branch"]
    assert (run == first["run_id"]) == (start in ("checkpoint-2", "latest"))
    assert (branch == first["branch"]) == (start == "latest")
    history = RunHistory.from_json(storage.read_json(output / "run_history.json"))
    assert history.mark == Mark(run, branch)
    for path in [*output.glob("checkpoint-*")]:
        manifest = storage.read_manifest(path)
        mark = (history_of(manifest) or RunHistory.new()).mark
        assert history.owns(mark, int(manifest.metadata["global_step"]))
    assert {"checkpoint-6", "checkpoint-best"} <= {path.name for path in output.iterdir()}

    for name in (WEIGHTS, f"ema/{WEIGHTS}"):
        assert storage.read_tensor_metadata(output / name)["global_step"] == "6"
        assert repo.files[name] == (output / name).read_bytes()
    assert repo.tagged == {"step-4": 1, "step-6": 2}
    mine = {"run": run, "branch": branch}
    for name in ("final_weights.json", "hub_upload.json", "eval_losses.json", "wandb_run.json"):
        assert storage.read_json(output / name).items() >= mine.items()
    assert (storage.read_json(output / "wandb_run.json")["id"] == first_id) == (start == "latest")

    taken = wandb.steps[storage.read_json(output / "wandb_run.json")["id"]]
    assert taken == list(range({"none": 1, "latest": 1}.get(start, 3), 7))
    logged = EventAccumulator(str(next((output / "logs").iterdir()))).Reload()
    before = 0 if start in ("none", "checkpoint-2", "latest") else 2
    assert [point.step for point in logged.Scalars("train/loss")] == list(range(before + 1, 7))
    assert [record["step"] for record in metrics(output, "step_done")] == list(range(before + 1, 7))
    losses = {record["step"]: record["pooled"] for record in metrics(output, "eval_done")}
    known = json.loads((output / "eval_losses.json").read_text())["losses"]
    assert {int(step): loss for step, loss in known.items()} == losses
    best = storage.read_manifest(output / "checkpoint-best").metadata
    assert best["eval_loss"] == min(loss for step, loss in losses.items() if step > 0)
    report = read_run(output)
    assert report.state == "finished"
    assert report.start["run_id"] == run
    asked = (output / "asked.txt").read_text().splitlines()
    assert asked[-1] == str(output / "checkpoint-6")

    moved = [path for path in (output / "earlier-runs").glob("*")]
    assert len(moved) == (0 if start == "latest" else 1)
    if moved:
        assert (moved[0] / WEIGHTS).is_file()
        assert storage.read_tensor_metadata(moved[0] / WEIGHTS)["global_step"] == "4"
