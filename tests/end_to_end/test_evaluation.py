"""The eval loss in whole runs: equal for equal weights, what it keeps, and what it ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from simpletuner import storage
from simpletuner.errors import Interrupted
from simpletuner.training import evaluate, loop
from simpletuner.training.evaluation import EvalResult, Evaluator
from tests.runs import dataset, metrics, train_here, write_images, write_run
from tests.tiny import tiny_omnigen_folder

EVERY_STEP = {"eval_steps_interval": 1, "max_train_steps": 6, "checkpoint_step_interval": 3}


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def fall_until(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let each eval loss be 10 - step up to `step` and 20 afterwards, so that a test knows which is the best."""

    def known(run: Any) -> None:
        now = run.progress.global_step
        result = EvalResult({"held_out": 0.0}, 10.0 - now if now <= step else 20.0, [])
        run.evaluator = SimpleNamespace(run=lambda denoiser: result, identity=run.evaluator.identity)
        real(run)

    real = evaluate.evaluate
    monkeypatch.setattr(loop, "evaluate", known)


def losses(output: Path) -> dict[int, float]:
    return {event["step"]: event["pooled"] for event in metrics(output, "eval_done")}


@pytest.mark.slow
def test_equal_weights_have_an_equal_eval_loss_whatever_happened_between(tmp_path: Path, omnigen_folder: Path):
    still = {**EVERY_STEP, "learning_rate": 1e-30, "caption_dropout_probability": 0.0}
    watched = {"validation_disable": False, "validation_prompt": "a star", "validation_resolution": "32"}
    folder = write_run(
        tmp_path, omnigen_folder, **still, **watched, validation_step_interval=2, validation_num_inference_steps=2
    )
    found = losses(train_here(folder))
    assert len(found) == 7
    assert max(found.values()) - min(found.values()) <= 1e-6
    # The base is judged with its adapter off: the same weights as far as this run has come.
    for event in metrics(folder / "output", "eval_done"):
        assert event["reference"] == pytest.approx(event["pooled"], abs=1e-6)
        assert len(event["reference_per_quantile"]) == 3
        assert event["seconds"] > 0


@pytest.mark.slow
def test_the_reference_is_the_untouched_base_however_far_training_is(tmp_path: Path, omnigen_folder: Path):
    events = metrics(train_here(write_run(tmp_path, omnigen_folder, **EVERY_STEP)), "eval_done")
    assert {event["reference"] for event in events} == {events[0]["reference"]}
    assert events[0]["pooled"] == pytest.approx(events[0]["reference"], abs=1e-6)
    assert events[-1]["pooled"] != pytest.approx(events[-1]["reference"], abs=1e-6)


@pytest.mark.slow
def test_the_best_checkpoint_is_the_state_of_the_lowest_loss(tmp_path: Path, omnigen_folder: Path, monkeypatch):
    fall_until(monkeypatch, 3)
    folder = write_run(
        tmp_path, omnigen_folder, **{**EVERY_STEP, "checkpoints_total_limit": 1}, checkpoint_keep_best=True
    )
    output = train_here(folder)
    assert storage.verify_dir(output / "checkpoint-best") == []
    metadata = storage.read_manifest(output / "checkpoint-best").metadata
    assert (metadata["global_step"], metadata["eval_loss"]) == (3, 7.0)
    assert not (output / "checkpoint-3").exists()  # rotated; the best is not

    other = train_here(write_run(tmp_path / "other", omnigen_folder, **{**EVERY_STEP, "max_train_steps": 3}))
    assert weights(output / "checkpoint-best") == weights(other / "checkpoint-3")
    [finished] = metrics(output, "run_finished")
    assert finished["outputs"]["best checkpoint (step 3, eval loss 7.0000)"] == str(output / "checkpoint-best")


@pytest.mark.slow
def test_a_run_goes_on_from_the_best_checkpoint_by_name_and_as_the_latest(
    tmp_path: Path, omnigen_folder: Path, monkeypatch
):
    options: dict[str, Any] = {**EVERY_STEP, "checkpoint_step_interval": 2, "checkpoint_keep_best": True}
    fall_until(monkeypatch, 3)
    output = train_here(write_run(tmp_path, omnigen_folder, **options))
    expected = weights(output / "checkpoint-6")
    for name in ("checkpoint-4", "checkpoint-6"):
        storage.remove_dir(output / name)
    # checkpoint-2 and checkpoint-best (step 3) are left.
    train_here(tmp_path)
    assert weights(output / "checkpoint-6") == expected
    assert "resumed checkpoint-best: step 3 of 6" in [event["text"] for event in metrics(output, "notice")]
    storage.remove_dir(output / "checkpoint-6")
    train_here(tmp_path, "--resume_from_checkpoint=checkpoint-best")
    assert weights(output / "checkpoint-6") == expected


@pytest.mark.slow
def test_the_best_of_an_earlier_run_is_skipped_at_a_fresh_start(tmp_path: Path, omnigen_folder: Path):
    folder = write_run(tmp_path, omnigen_folder, **EVERY_STEP, checkpoint_keep_best=True)
    output = train_here(folder)
    before = weights(output / "checkpoint-best")
    train_here(folder, "--resume_from_checkpoint=none")
    [earlier] = (output / "earlier-runs").iterdir()
    assert weights(earlier / "checkpoint-best") == before


@pytest.mark.slow
def test_patience_ends_a_run_as_finished_and_a_second_start_knows(tmp_path: Path, omnigen_folder: Path, monkeypatch):
    fall_until(monkeypatch, 2)
    options = {**EVERY_STEP, "max_train_steps": 50, "early_stopping_patience": 2}
    output = train_here(write_run(tmp_path, omnigen_folder, **options))
    [finished] = metrics(output, "run_finished")
    assert finished["step"] == 4
    assert (output / "checkpoint-4").is_dir()
    assert (output / "pytorch_lora_weights.safetensors").is_file()
    [line] = [event["text"] for event in metrics(output, "notice") if "early_stopping_patience" in event["text"]]
    assert "ends at step 4" in line
    assert "8.0000 of step 2" in line

    train_here(tmp_path)
    reported = [event["text"] for event in metrics(output, "notice")]
    assert reported[-1].endswith("is complete: step 4 of 50")
    train_here(tmp_path, "--early_stopping_patience=4")
    assert metrics(output, "run_finished")[-1]["step"] == 6


@pytest.mark.slow
def test_a_killed_run_remembers_evaluations_after_its_last_checkpoint(
    tmp_path: Path, omnigen_folder: Path, monkeypatch
):
    """Step 4 was evaluated after checkpoint-4: the run that goes on from it must know that loss."""
    fall_until(monkeypatch, 4)
    options = {**EVERY_STEP, "checkpoint_step_interval": 4, "early_stopping_patience": 2, "max_train_steps": 9}
    folder = write_run(tmp_path, omnigen_folder, **options)
    report = loop.report_step

    def die(run: Any, *arguments: Any) -> None:
        if run.progress.global_step == 5:
            raise KeyboardInterrupt
        report(run, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "report_step", die)
        with pytest.raises(KeyboardInterrupt):
            train_here(folder)
    assert json.loads((folder / "output" / "eval_losses.json").read_text())["losses"]["4"] == 6.0
    train_here(folder)
    assert metrics(folder / "output", "run_finished")[-1]["step"] == 6


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_leaves_its_evaluation_and_makes_up_for_it(
    tmp_path: Path, omnigen_folder: Path, monkeypatch
):
    """A rented machine gives thirty seconds: no pass is waited for, and no half of one is recorded."""
    options = {**EVERY_STEP, "max_train_steps": 4, "train_batch_size": 1, "use_ema": True}
    expected = train_here(write_run(tmp_path / "whole", omnigen_folder, **options))
    folder = write_run(tmp_path / "stopped", omnigen_folder, **options)
    passes: list[int] = []
    chunk_losses = Evaluator._chunk_losses

    def count(*arguments: Any) -> list[float]:
        passes.append(1)
        if len(passes) == 2 * 6 + 2:  # two images at three timesteps, at steps 0 and 1; the second pass of step 2
            signal.raise_signal(signal.SIGTERM)
        return chunk_losses(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Evaluator, "_chunk_losses", count)
        with pytest.raises(Interrupted, match="checkpoint-2"):
            train_here(folder)
    assert len(passes) == 2 * 6 + 2
    assert list(losses(folder / "output")) == [0, 1]
    output = train_here(folder)
    assert losses(output) == losses(expected)
    assert weights(output / "checkpoint-4") == weights(expected / "checkpoint-4")
    assert weights(output) == weights(expected)


def test_a_share_of_the_images_is_held_out_and_never_trained_on(tmp_path: Path, omnigen_folder: Path, monkeypatch):
    seen: set[str] = set()
    train_window = loop.train_window

    def remember(run: Any, window: Any) -> Any:
        seen.update(digest for batch in window.batches for digest in batch.digests)
        return train_window(run, window)

    monkeypatch.setattr(loop, "train_window", remember)
    write_images(tmp_path / "images", 12, seed=1)
    folder = write_run(
        tmp_path, omnigen_folder, [dataset("images")], **EVERY_STEP, eval_holdout=0.3, num_eval_images=12
    )
    output = train_here(folder)
    [reported] = [event["text"] for event in metrics(output, "notice") if "held out" in event["text"]]
    count = int(reported.split()[1])
    assert reported == f"images: {count} of 12 images are held out for the eval loss"
    assert len(seen) == 12 - count
    assert set(metrics(output, "eval_done")[0]["losses"]) == {"images.holdout"}
    assert not (folder / "cache" / "vae" / "omnigen" / "images.holdout").exists()  # it shares the latents


@pytest.mark.slow
def test_one_eval_dataset_can_be_chosen(tmp_path: Path, omnigen_folder: Path):
    for name, seed in (("images", 1), ("first", 2), ("second", 3)):
        write_images(tmp_path / name, 2, seed)
    data = [dataset("images"), *(dataset(name, dataset_type="eval") for name in ("first", "second"))]
    options = {**EVERY_STEP, "max_train_steps": 1, "eval_dataset_id": "second"}
    output = train_here(write_run(tmp_path, omnigen_folder, data, **options))
    assert {tuple(event["losses"]) for event in metrics(output, "eval_done")} == {("second",)}


@pytest.mark.slow
def test_the_training_loss_is_reported_by_noise_level(tmp_path: Path, omnigen_folder: Path):
    output = train_here(write_run(tmp_path, omnigen_folder))
    [event] = metrics(output, "loss_by_sigma")
    # Regularization samples are compared with the base itself and do not count.
    records = [record for record in metrics(output, "step_done") if "regularisation_loss" not in record["extra"]]
    assert (event["step"], event["first_step"]) == (8, records[0]["step"])
    assert sum(count for *_, count in event["bins"]) == sum(record["samples"] for record in records)
    mean = sum(loss * count for *_, loss, count in event["bins"]) / sum(count for *_, count in event["bins"])
    expected = sum(r["loss"] * r["samples"] for r in records) / sum(r["samples"] for r in records)
    assert mean == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_full_training_takes_its_reference_before_the_first_step(tmp_path: Path):
    model = tiny_omnigen_folder(tmp_path / "model")
    options = {**EVERY_STEP, "model_type": "full", "max_train_steps": 2, "learning_rate": 1e-3}
    events = metrics(train_here(write_run(tmp_path / "run", model, **options)), "eval_done")
    assert [event["reference"] for event in events] == [events[0]["pooled"]] * 3


@pytest.mark.slow
def test_the_masks_of_held_out_images_count_in_their_loss(tmp_path: Path, omnigen_folder: Path):
    """A mask of all of an image changes nothing, one of a corner does."""
    found = {}
    for name, box in (("none", None), ("whole", (0, 0, 64, 64)), ("corner", (0, 0, 16, 16))):
        folder = tmp_path / name
        write_images(folder / "images", 6, seed=1)
        data = [dataset("images", **({"conditioning_data": "masks"} if box else {}))]
        if box:
            (folder / "masks").mkdir()
            for path in (folder / "images").glob("*.png"):
                mask = Image.new("RGB", (64, 64))
                mask.paste((255, 255, 255), box)
                mask.save(folder / "masks" / path.name)
            masks = {"instance_data_dir": "masks", "conditioning_type": "mask"}
            data.append({"id": "masks", "type": "local", "dataset_type": "conditioning", **masks})
        options = {**EVERY_STEP, "max_train_steps": 1, "eval_holdout": 0.5}
        output = train_here(write_run(folder, omnigen_folder, data, **options))
        found[name] = metrics(output, "eval_done")[0]["pooled"]
    assert found["whole"] == pytest.approx(found["none"], rel=1e-6)
    assert found["corner"] != pytest.approx(found["none"], rel=1e-3)
