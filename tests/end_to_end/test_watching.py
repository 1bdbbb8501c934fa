"""Watching a run changes nothing of it, and shows what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from simpletuner.examples import example_dir
from simpletuner.training.loop import run_training
from tests.runs import dataset, metrics, train_here, write_run
from tests.tiny import tiny_clip_folder

MODEL = example_dir("omnigen-tiny") / "model"


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_weights_are_bitwise_the_same_whether_a_run_is_watched_or_not(tmp_path: Path, omnigen_folder: Path, full: bool):
    options = {"max_train_steps": 4, "use_ema": True, "model_type": "full" if full else "lora"}
    options |= {"learning_rate": 1e-3 if full else 1e-2, "caption_dropout_probability": 0.3}
    plain = train_here(write_run(tmp_path / "plain", omnigen_folder, **options))
    model = tmp_path / "model"
    model.mkdir()
    for part in omnigen_folder.iterdir():
        (model / part.name).symlink_to(part)
    (model / "preview_decoder").symlink_to(MODEL / "preview_decoder")
    clip = tiny_clip_folder(tmp_path / "clip")
    watched = {
        "validation_disable": False,
        "validation_prompt": "a star",
        "validation_resolution": "32",
        "validation_num_inference_steps": 4,
        "validation_step_interval": 1,
        "validation_on_startup": True,
        "num_validation_images": 2,
        "validation_preview": True,
        "validation_preview_steps": 2,
        "evaluation_type": "clip",
        "pretrained_evaluation_model_name_or_path": str(clip),
        "eval_steps_interval": 1,
        "checkpoint_keep_best": True,
        "report_to": "tensorboard",
    }
    folder = write_run(tmp_path / "watched", model, **options, **watched)
    output = train_here(folder)
    assert len(metrics(output, "pictures_made")) == len(metrics(output, "pictures_scored")) == 5
    assert len(metrics(output, "eval_done")) == 5
    # Previews of the base once, then of the live and the averaged weights: two images, two steps each.
    assert len(metrics(output, "preview_made")) == (1 + 2 * 5) * 2 * 2
    assert [record["loss"] for record in metrics(output, "step_done")] == [
        record["loss"] for record in metrics(plain, "step_done")
    ]
    expected = weights(plain / "checkpoint-4")
    assert len(expected) >= 3
    assert weights(output / "checkpoint-4") == expected


@pytest.mark.slow
def test_the_example_shows_previews_at_the_right_steps_and_its_eval_loss_falls(tmp_path: Path):
    source = example_dir("omnigen-tiny") / "datasets"
    data = [
        dataset("concept", instance_data_dir=str(source / "concept")),
        dataset("concept-eval", instance_data_dir=str(source / "concept-eval"), dataset_type="eval"),
    ]
    options = {
        "max_train_steps": 40,
        "train_batch_size": 4,
        "learning_rate": 2e-3,
        "caption_dropout_probability": 0.0,
        "eval_steps_interval": 20,
        "num_eval_images": 4,
        "validation_disable": False,
        "validation_prompt": "a red star on a white background",
        "validation_negative_prompt": "<cfg>",
        "validation_resolution": "64",
        "validation_num_inference_steps": 20,
        "validation_step_interval": 40,
        "validation_preview": True,
        "validation_preview_steps": 5,
    }
    output = train_here(write_run(tmp_path, MODEL, data, **options))
    previews = [record for record in metrics(output, "preview_made") if record["picture"]["kind"] == "live"]
    assert [(each["step"], each["sampling_step"]) for each in previews] == [(40, 5), (40, 10), (40, 15), (40, 20)]
    for each in previews:
        with Image.open(each["picture"]["path"]) as image:
            assert image.size == (64, 64)
    start, _, end = (record["pooled"] for record in metrics(output, "eval_done"))
    assert end < 0.97 * start
    assert metrics(output, "eval_done")[-1]["reference"] == pytest.approx(start, rel=1e-5)


@pytest.mark.slow
def test_images_can_begin_late_and_the_end_always_has_them(tmp_path: Path, omnigen_folder: Path):
    watched = {
        "validation_disable": False,
        "validation_prompt": "a star",
        "validation_resolution": "32",
        "validation_num_inference_steps": 1,
        "validation_step_interval": 1,
        "max_train_steps": 6,
    }
    late = train_here(write_run(tmp_path / "late", omnigen_folder, **watched, validate_after_step=4))
    assert [record["step"] for record in metrics(late, "pictures_made")] == [0, 4, 5, 6]
    never = train_here(write_run(tmp_path / "never", omnigen_folder, **watched, validate_after_epoch=1000))
    assert [record["step"] for record in metrics(never, "pictures_made")] == [0, 6]


@pytest.mark.slow
def test_a_validation_that_fails_is_reported_and_training_goes_on(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """The folder for images is a file."""
    watched = {"validation_disable": False, "validation_prompt": "a star", "validation_resolution": "32"}
    options = {**watched, "validation_num_inference_steps": 2, "validation_step_interval": 2, "max_train_steps": 4}
    folder = write_run(tmp_path, omnigen_folder, **options)

    def train_beside_it(run: Any) -> None:  # what lies there before a fresh start is moved
        (run.session.output_dir / "validation_images").write_text("in the way")
        run_training(run)

    monkeypatch.setattr("simpletuner.training.trainer.run_training", train_beside_it)
    output = train_here(folder)
    reported = [record["text"] for record in metrics(output, "notice") if record["severity"] == "error"]
    assert len(reported) == 2
    assert all(text.endswith("training continues") for text in reported)
    assert metrics(output, "run_finished")[0]["step"] == 4
