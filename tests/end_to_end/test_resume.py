"""A run that was interrupted ends with the bits of one that was not."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from simpletuner import storage
from simpletuner.errors import ConfigError
from simpletuner.training import loop
from simpletuner.training.checkpoint import numbered_checkpoints
from tests.runs import (
    cli,
    metrics,
    require_same_bits_after_a_stop,
    run_cli,
    slow_but,
    train_here,
    weights_of,
    write_run,
)

VARIANTS = {
    "lokr": {},
    "lokr, bf16, stochastic rounding": {"optimizer": "adamw_bf16", "mixed_precision": "bf16"},
    "lokr, accumulation, EMA, clip by value": {
        "gradient_accumulation_steps": 3,
        "use_ema": True,
        "grad_clip_method": "value",
        "max_grad_norm": 0.01,
    },
    "full, cosine, EMA, clip by norm": {
        "model_type": "full",
        "use_ema": True,
        "lr_scheduler": "cosine",
        "learning_rate": 1e-3,
        "grad_clip_method": "norm",
    },
    "lokr, latents encoded on demand": {"vae_cache_ondemand": True},
}


QUICK = ("lokr, accumulation, EMA, clip by value", "full, cosine, EMA, clip by norm")


@pytest.mark.slow
@pytest.mark.parametrize("variant", slow_but(VARIANTS, QUICK))
def test_a_run_stopped_by_sigterm_and_resumed_ends_with_the_same_bits(tmp_path, omnigen_folder, monkeypatch, variant):
    require_same_bits_after_a_stop(
        lambda folder: write_run(folder, omnigen_folder, **VARIANTS[variant]), tmp_path, monkeypatch
    )


@pytest.mark.slow
def test_evaluation_validation_and_trackers_do_not_change_a_bit(tmp_path, omnigen_folder):
    plain = train_here(write_run(tmp_path / "plain", omnigen_folder))
    watched = train_here(
        write_run(
            tmp_path / "watched",
            omnigen_folder,
            validation_disable=False,
            validation_prompt="a cat",
            validation_resolution="64x64",
            validation_step_interval=3,
            validation_num_inference_steps=2,
            eval_steps_interval=2,
            report_to="tensorboard",
        )
    )
    assert weights_of(watched / "checkpoint-8") == weights_of(plain / "checkpoint-8")


@pytest.mark.slow
def test_a_damaged_latest_checkpoint_is_skipped_and_the_one_before_is_used(tmp_path, omnigen_folder):
    folder = write_run(tmp_path / "run", omnigen_folder)
    output = train_here(folder)
    expected = weights_of(output / "checkpoint-8")
    damaged = output / "checkpoint-8" / "optimizer.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    train_here(folder)
    assert (output / "damaged-checkpoint-8").is_dir()
    assert weights_of(output / "checkpoint-8") == expected


def test_a_folder_of_damaged_checkpoints_is_an_error_and_never_a_fresh_start(tmp_path, omnigen_folder):
    folder = write_run(tmp_path / "run", omnigen_folder, checkpoints_total_limit=1)
    output = train_here(folder)
    (output / "checkpoint-8" / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="resume_from_checkpoint"):
        train_here(folder)


def test_stray_folders_are_never_taken_for_checkpoints(tmp_path, omnigen_folder):
    folder = write_run(tmp_path / "run", omnigen_folder, max_train_steps=2)
    output = train_here(folder)
    for name in ("checkpoint-best", "checkpoint-99 (copy)", "checkpoint-", "xcheckpoint-50"):
        (output / name).mkdir()
    train_here(folder, "--max_train_steps=4")
    assert [record["step"] for record in metrics(output, "step_done")] == [1, 2, 3, 4]


def test_a_chart_library_that_cannot_be_imported_costs_the_loss_curve_only(tmp_path, omnigen_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    output = train_here(write_run(tmp_path / "run", omnigen_folder, max_train_steps=1), draws_curve=True)
    assert any("no loss curve: " in record["text"] for record in metrics(output, "notice"))
    assert len(metrics(output, "run_finished")) == 1
    assert not (output / "loss.png").exists()


def test_a_finished_run_started_again_writes_no_checkpoint(tmp_path, omnigen_folder, capsys):
    folder = write_run(tmp_path / "run", omnigen_folder, max_train_steps=2)
    output = train_here(folder)
    before = (output / "checkpoint-2" / "manifest.json").stat().st_mtime_ns
    train_here(folder)
    assert "complete" in capsys.readouterr().out
    assert (output / "checkpoint-2" / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_still_gets_its_evaluation_images_and_weights(
    tmp_path, omnigen_folder, monkeypatch
):
    """The last checkpoint is older than the last images and the final weights: a kill between them is made up for."""
    watched = {"validation_disable": False, "validation_prompt": "a star", "validation_resolution": "32"}
    watched |= {"validation_num_inference_steps": 2, "validation_step_interval": 2, "eval_steps_interval": 2}
    options = {**watched, "max_train_steps": 2}
    expected = train_here(write_run(tmp_path / "whole", omnigen_folder, **options))
    folder = write_run(tmp_path / "killed", omnigen_folder, **options)
    evaluate = loop.maybe_evaluate

    def die(run: Any, always: bool = False) -> None:
        if run.progress.global_step == 2:
            raise KeyboardInterrupt
        evaluate(run, always)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "maybe_evaluate", die)
        with pytest.raises(KeyboardInterrupt):
            train_here(folder)
    assert (folder / "output" / "checkpoint-2").is_dir()
    output = train_here(folder)
    for name in ("pytorch_lora_weights.safetensors", "validation_images/step_2_validation_0_32x32.png"):
        assert (output / name).read_bytes() == (expected / name).read_bytes()
    evaluations = [[event["step"], event["pooled"]] for event in metrics(output, "eval_done")]
    assert evaluations == [[event["step"], event["pooled"]] for event in metrics(expected, "eval_done")]

    train_here(folder)
    assert len(metrics(output, "run_finished")) == 1
    assert metrics(output, "notice")[-1]["text"].endswith("is complete: step 2 of 2")


@pytest.mark.parametrize("killed_at", [3, 4])
def test_a_kill_between_a_checkpoint_and_its_rotation_leaves_none_beyond_the_limit(
    tmp_path, omnigen_folder, monkeypatch, killed_at
):
    folder = write_run(
        tmp_path / "run", omnigen_folder, max_train_steps=4, checkpoint_step_interval=1, checkpoints_total_limit=2
    )
    remove = storage.remove_dir

    def die(path: Path) -> None:
        if path.name == f"checkpoint-{killed_at - 2}":
            raise KeyboardInterrupt
        remove(path)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "remove_dir", die)
        with pytest.raises(KeyboardInterrupt):
            train_here(folder)
    left = [path.name for path in numbered_checkpoints(folder / "output")]
    assert left == [f"checkpoint-{step}" for step in range(killed_at - 2, killed_at + 1)]
    train_here(folder)
    assert [path.name for path in numbered_checkpoints(folder / "output")] == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("change", [{"optimizer": "adamw_bf16"}, {"model_type": "full"}])
def test_resuming_with_another_optimizer_or_kind_of_training_is_refused_by_key(tmp_path, omnigen_folder, change):
    folder = write_run(tmp_path / "run", omnigen_folder, max_train_steps=2)
    train_here(folder)
    changed = write_run(tmp_path / "changed", omnigen_folder, max_train_steps=4, **change)
    with pytest.raises(ConfigError, match=next(iter(change))):
        train_here(changed, f"--output_dir={folder / 'output'}")


def test_a_named_checkpoint_that_is_not_there_is_an_error(tmp_path, omnigen_folder):
    folder = write_run(tmp_path / "run", omnigen_folder)
    with pytest.raises(ConfigError, match="checkpoint-77"):
        train_here(folder, "--resume_from_checkpoint=checkpoint-77")


@pytest.mark.slow
def test_a_run_killed_at_once_resumes_to_the_same_bits(tmp_path, omnigen_folder):
    straight = train_here(write_run(tmp_path / "straight", omnigen_folder))
    folder = write_run(tmp_path / "killed", omnigen_folder)
    process = subprocess.Popen(cli("train"), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(folder / "output" / "checkpoint-4", process)
    process.kill()
    process.wait()
    again = run_cli(folder, "train")
    assert again.returncode == 0, again.stderr
    assert weights_of(folder / "output" / "checkpoint-8") == weights_of(straight / "checkpoint-8")


@pytest.mark.ci
def test_a_storm_of_kills_at_random_instants_ends_with_the_same_bits(tmp_path, omnigen_folder):
    options = {
        "use_ema": True,
        "max_train_steps": 200,
        "checkpoint_step_interval": 1,
        "checkpoints_total_limit": 2,
        "validation_disable": False,
        "validation_prompt": "a cat",
        "validation_resolution": "64x64",
        "validation_step_interval": 20,
        "validation_num_inference_steps": 2,
        "eval_steps_interval": 7,
    }
    straight = train_here(write_run(tmp_path / "straight", omnigen_folder, **options))
    folder = write_run(tmp_path / "stormy", omnigen_folder, **options)
    rng = random.Random(11)
    num_kills = 0
    while num_kills < 12:
        process = subprocess.Popen(cli("train"), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            # From before the caches are there to the middle of saving, evaluating and generating.
            process.wait(rng.uniform(2.0, 6.0))
            assert process.returncode == 0, process.stderr.read().decode()
            break
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            num_kills += 1
    assert num_kills  # how many, the speed of the machine decides
    last = run_cli(folder, "train")
    assert last.returncode == 0, last.stderr
    assert weights_of(folder / "output" / "checkpoint-200") == weights_of(straight / "checkpoint-200")


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_143(tmp_path, omnigen_folder):
    folder = write_run(tmp_path / "run", omnigen_folder, max_train_steps=100000, checkpoint_step_interval=0)
    process = subprocess.Popen(cli("train"), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(folder / "output" / "metrics.jsonl", process, containing='"step_done"')
    process.terminate()
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    assert "Traceback" not in errors
    assert list((folder / "output").glob("checkpoint-*/manifest.json"))


@pytest.mark.slow
@pytest.mark.parametrize(("words", "code"), [((), 129), (("nohup",), 0)], ids=["a terminal that closes", "nohup"])
def test_a_hang_up_saves_and_leaves_but_not_under_nohup(tmp_path, omnigen_folder, words, code):
    steps = 60 if words else 100_000
    folder = write_run(tmp_path / "run", omnigen_folder, max_train_steps=steps, checkpoint_step_interval=0)
    command = [*words, *cli("train")]
    process = subprocess.Popen(
        command,
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # the tests may run under nohup themselves
    )
    wait_for(folder / "output" / "metrics.jsonl", process, containing='"step_done"')
    process.send_signal(signal.SIGHUP)
    try:
        _, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert list((folder / "output").glob("checkpoint-*/manifest.json"))
    assert (folder / "output" / "pytorch_lora_weights.safetensors").exists() == (code == 0)


def wait_for(path: Path, process: subprocess.Popen, containing: str = "", seconds: float = 120.0) -> None:
    """Wait until `path` is there (and holds a text); fail when the process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if path.exists() and (not containing or containing in path.read_text()):
            return
        assert process.poll() is None, "the run ended before it came so far"
        time.sleep(0.02)
    raise AssertionError(f"{path} did not appear")
