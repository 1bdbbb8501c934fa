"""`simpletuner verify-resume`: every difference between two runs is found and named, equal runs have none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from simpletuner import storage
from simpletuner.commands.run_differences import _unequal, compare_runs
from simpletuner.commands.verify_resume import POINTS, Death, _Proof, shortened, verify_resume
from simpletuner.errors import ConfigError, DataError
from tests.runs import load_here, train_here, write_run


def make_run(folder: Path, weight: float = 1.0, losses: tuple[float, ...] = (0.5, 0.25), **metadata: str) -> Path:
    """An output folder with two checkpoints, an image and an evaluation."""
    for step in (2, 4):
        checkpoint = folder / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        tensors = {"a": torch.tensor([[1.0, 2.0], [float(step), weight]]), "b": torch.zeros(3)}
        save_file(tensors, checkpoint / "w.safetensors", metadata)
    (folder / "validation_images").mkdir()
    Image.fromarray(np.full((2, 2, 3), 7, np.uint8)).save(folder / "validation_images" / "step_2_a.png")
    records = [{"event": "step_done", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    records.append({"event": "eval_done", "step": 2, "pooled": 0.125})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def test_equal_runs_have_no_difference_and_say_what_was_compared(tmp_path: Path):
    found = compare_runs(make_run(tmp_path / "a"), make_run(tmp_path / "b", note="another header"))
    assert found.lines == ()
    assert found.counted() == "4 tensors, 2 losses, 1 evaluations, 1 images"


def test_the_first_tensor_that_differs_is_named_with_its_place_and_both_values(tmp_path: Path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", weight=1.5)
    assert compare_runs(one, other).lines[0] == (
        "checkpoint-2/w.safetensors: a: 1 of 4 numbers, first at [1, 1]: 1.0 and 1.5"
    )


def spoil_nan(run: Path) -> None:
    tensors = load_file(run / "checkpoint-4" / "w.safetensors")
    save_file(tensors | {"b": torch.tensor([0.0, float("nan"), 0.0])}, run / "checkpoint-4" / "w.safetensors")


def spoil_dtype(run: Path) -> None:
    tensors = load_file(run / "checkpoint-4" / "w.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, run / "checkpoint-4" / "w.safetensors")


def spoil_image(run: Path) -> None:
    Image.fromarray(np.full((2, 2, 3), 8, np.uint8)).save(run / "validation_images" / "step_2_a.png")


def spoil_record(old: str, new: str) -> Callable[[Path], None]:
    def spoil(run: Path) -> None:
        text = (run / "metrics.jsonl").read_text()
        assert old in text
        (run / "metrics.jsonl").write_text(text.replace(old, new))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (spoil_nan, "checkpoint-4/w.safetensors: b: 1 of 3 numbers, first at [1]: 0.0 and nan"),
        (spoil_dtype, "checkpoint-4/w.safetensors: a is float32 [2, 2] and bfloat16 [2, 2]"),
        (spoil_image, "validation_images/step_2_a.png: other pixels"),
        (lambda run: (run / "validation_images" / "step_2_a.png").unlink(), "is only in one of them"),
        (lambda run: (run / "checkpoint-2" / "w.safetensors").unlink(), "checkpoint-2/w.safetensors is only in one"),
        (spoil_record("0.25", "0.26"), "the loss of step 2: 0.25 and 0.26"),
        (spoil_record("0.125", "0.5"), "the evaluation of step 2: 0.125 and 0.5"),
    ],
)
def test_every_kind_of_difference_is_found(tmp_path: Path, spoil: Callable[[Path], None], line: str):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    spoil(other)
    [found] = compare_runs(one, other).lines
    assert line in found
    assert len(compare_runs(other, one).lines) == 1


def test_what_lies_before_the_copied_step_is_not_compared(tmp_path: Path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", losses=(0.7, 0.25))
    assert compare_runs(one, other, start_step=1).lines == ()
    other = make_run(tmp_path / "third", losses=(0.7, 0.3))
    assert compare_runs(one, other, start_step=1).lines == ("the loss of step 2: 0.25 and 0.3",)


def test_the_proof_keeps_evaluation_images_and_average_and_nothing_leaves_it(tmp_path: Path, omnigen_folder: Path):
    options = {"report_to": "tensorboard", "use_ema": True, "eval_steps_interval": 50, "validation_step_interval": 50}
    images = {"validation_disable": False, "validation_prompt": "a box", "validation_resolution": "32"}
    loaded = load_here(write_run(tmp_path / "run", omnigen_folder, **options, **images))
    short = shortened(loaded, tmp_path / "elsewhere", 9)
    before, after = loaded.resolved(), short.resolved()
    changed = {key: after[key] for key in before if before[key] != after[key]}
    assert changed.pop("output_dir") == str(tmp_path / "elsewhere")
    assert changed.pop("validation_num_inference_steps") == 2
    assert changed.pop("report_to") == ["none"]
    assert changed == {
        "max_train_steps": 9,
        "checkpoints_total_limit": None,
        "eval_steps_interval": 2,
        "validation_step_interval": 2,
    }
    assert not short.webhooks.targets


def test_the_proof_starts_no_program_of_the_user_s(tmp_path: Path, omnigen_folder: Path):
    script = {"validation_method": "external-script", "validation_external_script": "send {local_checkpoint_path}"}
    loaded = load_here(write_run(tmp_path / "run", omnigen_folder, validation_disable=False, **script))
    assert shortened(loaded, tmp_path / "elsewhere", 9).config.validation.validation_disable


def test_a_run_of_several_machines_is_refused_by_name(tmp_path: Path, omnigen_folder: Path):
    loaded = load_here(write_run(tmp_path / "run", omnigen_folder))
    several = loaded.__class__(**{**vars(loaded), "config": loaded.config.with_values({"num_machines": 2})})
    with pytest.raises(ConfigError, match="num_machines"):
        verify_resume(several, (), 6, print)


@pytest.mark.ci
def test_a_run_killed_again_and_again_is_proved_equal_from_a_copy_of_the_folder(
    tmp_path: Path, omnigen_folder: Path, monkeypatch
):
    images = {"validation_disable": False, "validation_prompt": "a box", "validation_resolution": "32"}
    options = {"use_ema": True, "max_train_steps": 3, "checkpoint_step_interval": 3, "eval_steps_interval": 3}
    folder = write_run(tmp_path / "run", omnigen_folder, **options, **images, validation_step_interval=3)
    output = train_here(folder)
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CONFIG_PATH", "config.json")
    said: list[str] = []
    assert verify_resume(load_here(folder), (), 6, said.append), said
    assert "from step 3" in said[0]
    deaths = [line for line in said if "killed at" in line]
    assert len(deaths) >= 8
    assert said[-1].startswith("equal, bit for bit")
    assert "6 losses" in said[-1]
    assert {path: path.read_bytes() for path in output.rglob("*") if path.is_file()} == before
    assert storage.verify_dir(output / "checkpoint-3") == []
    assert [path.name for path in folder.iterdir() if path.name.startswith("verify-resume-")] == []


@pytest.mark.ci
def test_two_processes_are_killed_together_and_proved_equal(tmp_path: Path, omnigen_folder: Path, monkeypatch):
    folder = write_run(tmp_path / "run", omnigen_folder, num_processes=2, use_ema=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CONFIG_PATH", "config.json")
    said: list[str] = []
    assert verify_resume(load_here(folder), (), 4, said.append), said
    assert len([line for line in said if "killed at" in line]) >= 5
    assert said[-1].startswith("equal, bit for bit")


@pytest.mark.slow
def test_a_run_that_fails_by_itself_is_reported_with_its_reason(tmp_path: Path, omnigen_folder: Path, monkeypatch):
    folder = write_run(tmp_path / "run", omnigen_folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CONFIG_PATH", "config.json")
    loaded = load_here(folder)
    for path in (folder / "images").glob("*.png"):
        path.write_bytes(b"torn")
    with pytest.raises(DataError, match="failed before it was killed"):
        verify_resume(loaded, (), 6, print)


def test_a_death_says_where_it_is():
    assert str(Death(4, "before the update")) == "step 5: before the update"
    assert "file operation 7" in str(Death(4, operation=7))


def test_a_run_dies_at_its_first_file_operation_at_its_last_and_between():
    """10 until the checkpoint is committed, 14 with evaluation and images; after the first save at step 2."""
    proof = object.__new__(_Proof)
    proof.start_step, proof.counts = 0, {"4": (10, 14)}
    deaths = proof.deaths()
    assert [(death.step, death.point) for death in deaths[:3]] == [(2, point) for point in POINTS]
    assert [(death.step, death.operation) for death in deaths[3:]] == [(4, number) for number in (1, 3, 5, 8, 10, 14)]
    proof.start_step, proof.counts = 3, {"6": (1, 1)}
    assert [(death.step, death.operation) for death in proof.deaths()[2:]] == [(4, 0), (6, 1)]


def test_nan_equals_nan_and_nothing_else():
    one, other = torch.tensor([1.0, torch.nan, 2.0, torch.nan]), torch.tensor([1.0, torch.nan, torch.nan, 3.0])
    assert _unequal(one, other).tolist() == [[2], [3]]
