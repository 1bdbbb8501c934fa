"""What a user can fix ends before any training, with one message that names file and key, and no traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.runs import dataset, run_forked, write_images, write_run


def change_json(path: Path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def missing_folder(folder: Path) -> None:
    shutil.rmtree(folder / "images")


def empty_folder(folder: Path) -> None:
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()


def a_text_as_only_image(folder: Path) -> None:
    empty_folder(folder)
    (folder / "images" / "cat.png").write_text("this is no image")
    (folder / "images" / "cat.txt").write_text("a cat")


def misspelled_key(folder: Path) -> None:
    change_json(folder / "config.json", lambda config: config.update(learning_ratee=1e-4))


def misspelled_dataset_key(folder: Path) -> None:
    change_json(folder / "multidatabackend.json", lambda data: data[0].update(repeat=3))


def unmatched_lycoris_entry(folder: Path) -> None:
    change_json(
        folder / "lycoris_config.json", lambda lycoris: lycoris["apply_preset"]["target_module"].append("CrossAttn")
    )


def model_without_vae(folder: Path) -> None:
    model = json.loads((folder / "config.json").read_text())["pretrained_model_name_or_path"]
    shutil.copytree(model, folder / "broken_model")
    shutil.rmtree(folder / "broken_model" / "vae")
    change_json(folder / "config.json", lambda config: config.update(pretrained_model_name_or_path="broken_model"))


def missing_caption(folder: Path) -> None:
    (folder / "images" / "003.txt").unlink()


CASES = {
    missing_folder: (2, ["images.instance_data_dir", "multidatabackend.json"]),
    empty_folder: (3, ["images.instance_data_dir", "multidatabackend.json"]),
    a_text_as_only_image: (3, ["images.instance_data_dir", "multidatabackend.json"]),
    misspelled_key: (2, ["learning_ratee", "config.json", "learning_rate"]),
    misspelled_dataset_key: (2, ["repeat", "multidatabackend.json", "repeats"]),
    unmatched_lycoris_entry: (2, ["CrossAttn", "lycoris_config.json", "Attention"]),
    model_without_vae: (2, ["vae", "pretrained_model_name_or_path", "config.json"]),
    missing_caption: (3, ["003.png", "multidatabackend.json", "caption_strategy"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_wrong_input_ends_with_one_message_before_training(tmp_path, omnigen_folder, spoil):
    exit_code, named = CASES[spoil]
    folder = write_run(tmp_path / "run", omnigen_folder)
    spoil(folder)
    result = run_forked(folder, "train")
    assert result.returncode == exit_code, result.stderr
    for word in named:
        assert word in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    metrics = folder / "output" / "metrics.jsonl"
    assert not metrics.exists() or "step_done" not in metrics.read_text()


@pytest.mark.slow
def test_a_text_among_images_is_skipped_and_reported(tmp_path, omnigen_folder):
    folder = write_run(tmp_path / "run", omnigen_folder, max_train_steps=1)
    (folder / "images" / "note.png").write_text("this is no image")
    result = run_forked(folder, "train")
    assert result.returncode == 0, result.stderr
    report = json.loads((folder / "output" / "dataset_report.json").read_text())
    assert report[0]["found"] == 8
    assert report[0]["readable"] == 7
    assert report[0]["set_aside"][0]["examples"] == ["note.png"]


@pytest.mark.slow
def test_images_larger_than_the_model_can_take_are_refused(tmp_path, omnigen_folder):
    folder = write_run(tmp_path / "run", omnigen_folder)
    shutil.rmtree(folder / "images")
    write_images(folder / "images", 2, seed=5, side=512)
    change_json(folder / "multidatabackend.json", lambda data: data[0].update(resolution=512))
    result = run_forked(folder, "train")
    assert result.returncode == 2
    assert "images.resolution" in result.stderr
    assert "256" in result.stderr


@pytest.mark.slow
def test_where_no_image_is_left_the_report_still_names_each(tmp_path, omnigen_folder):
    folder = write_run(tmp_path, omnigen_folder, [dataset("images", caption_strategy="filename")])
    (folder / "images").mkdir()
    for number in range(12):
        (folder / f"images/{number}.png").write_text("hello")
    result = run_forked(folder, "train")
    assert result.returncode == 3
    assert "none of the 12 images" in result.stderr
    lines = (folder / "output/dataset_set_aside.jsonl").read_text().splitlines()
    assert {json.loads(line)["path"] for line in lines} == {f"{number}.png" for number in range(12)}
