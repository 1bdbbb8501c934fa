"""What a small run leaves beside its weights: the lock, and the eval loss as it was asked for."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.training.lock import LOCK_FILE, lock_changes
from tests.runs import dataset, metrics, train_here, write_images, write_run


@pytest.fixture(scope="module")
def folder(omnigen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    for name, seed in (("images", 1), ("first", 2), ("second", 3)):
        write_images(folder / name, 2, seed)
    data = [dataset("images")] + [dataset(name, dataset_type="eval") for name in ("first", "second")]
    write_run(folder, omnigen_folder, data, max_train_steps=1, eval_steps_interval=1, eval_dataset_pooling=True)
    train_here(folder, draws_curve=True)
    return folder


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_run_leaves_its_loss_curve(folder: Path):
    with Image.open(folder / "output" / "loss.png") as curve:
        assert curve.width > curve.height


def test_the_lock_names_versions_files_data_and_weights(folder: Path, omnigen_folder: Path):
    lock = json.loads((folder / "output" / LOCK_FILE).read_text())
    assert lock["packages"]["torch"] == metadata.version("torch")
    assert lock["config"]["learning_rate"] == 1e-2
    assert lock["config_files"] == {
        name: sha256(folder / name) for name in ("config.json", "multidatabackend.json", "lycoris_config.json")
    }
    assert {name: each["pictures"] for name, each in lock["data"].items()} == {"images": 2, "first": 2, "second": 2}
    weights = "transformer/diffusion_pytorch_model.safetensors"
    assert lock["base"]["files"][weights] == sha256(omnigen_folder / weights)
    assert {name.partition("/")[0] for name in lock["base"]["files"]} == {
        "transformer",
        "vae",
        "tokenizer",
        "scheduler",
    }


def test_pooled_evaluation_reports_one_loss(folder: Path):
    events = metrics(folder / "output", "eval_done")
    assert [event["losses"] for event in events] == [{}, {}]
    assert all(event["pooled"] > 0 for event in events)


def test_each_eval_dataset_has_its_loss_unless_they_are_pooled(folder: Path):
    output = train_here(folder, "--eval_dataset_pooling=false", "--output_dir=apart")
    for event in metrics(output, "eval_done"):
        assert set(event["losses"]) == {"first", "second"}
        # Two images in each, so that the mean of all images is the mean of the two means.
        assert event["pooled"] == pytest.approx(sum(event["losses"].values()) / 2)


def test_a_run_that_goes_on_reports_that_its_base_or_packages_changed(folder: Path):
    path = folder / "output" / LOCK_FILE
    lock = json.loads(path.read_text())
    lock["packages"] |= {"diffusers": "0.1", "torch": "1.0"}
    lock["base"]["files"]["vae/config.json"] = "0" * 64
    path.write_text(json.dumps(lock))
    train_here(folder, "--max_train_steps=2")
    reported = [
        event["text"] for event in metrics(folder / "output", "notice") if "since the last start" in event["text"]
    ]
    assert len(reported) == 2
    assert reported[0].startswith("package diffusers changed since the last start: 0.1 → ")
    assert reported[1] == "base model file vae/config.json changed since the last start: it has other content"
    assert lock_changes(json.loads(path.read_text()), json.loads(path.read_text())) == []
