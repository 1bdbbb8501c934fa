"""Small complete runs for tests: a model folder, a few generated images, and the two JSON files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from simpletuner.config.loading import LoadedRun, load_run
from simpletuner.errors import Interrupted
from simpletuner.training import finish, loop
from simpletuner.training.trainer import train
from tests.exit_codes import exit_code_of

LYCORIS = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 4,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 4}, "FeedForward": {"factor": 2}},
    },
}


def slow_but(names: Iterable[str], quick: Collection[str]) -> list[Any]:
    """Cases of a test, of which the quick suite looks at some."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def write_images(folder: Path, count: int, seed: int, side: int = 64) -> Path:
    """`count` PNGs of one rectangle each, with a caption file beside it."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    for index in range(count):
        color, ground = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        image = Image.new("RGB", (side, side), ground)
        left, top = rng.randrange(side // 2), rng.randrange(side // 2)
        ImageDraw.Draw(image).rectangle((left, top, left + side // 3, top + side // 3), fill=color)
        image.save(folder / f"{index:03d}.png")
        (folder / f"{index:03d}.txt").write_text(f"picture {index} of set {seed}\n")
    return folder


draw_pictures = write_images  # its name in scripts that show faults of earlier versions


def write_run(folder: Path, model: Path, data: list[dict[str, Any]] | None = None, **options: Any) -> Path:
    """Write config.json, multidatabackend.json and lycoris_config.json for a tiny run; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        write_images(folder / "images", 7, seed=1)
        write_images(folder / "held_out", 2, seed=2)
        write_images(folder / "regularisation", 3, seed=3)
        data = [
            dataset("images", repeats=1),
            dataset("regularisation", is_regularisation_data=options.get("model_type") != "full"),
            dataset("held_out", dataset_type="eval"),
        ]
    config = {
        "model_family": "omnigen",
        "pretrained_model_name_or_path": str(model),
        "output_dir": "output",
        "cache_dir": "cache",
        "data_backend_config": "multidatabackend.json",
        "lycoris_config": "lycoris_config.json",
        "seed": 3,
        "resolution": 64,
        "resolution_type": "pixel_area",
        "train_batch_size": 2,
        "max_train_steps": 8,
        "num_train_epochs": 0,
        "mixed_precision": "no",
        "optimizer": "adamw",
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "caption_dropout_probability": 0.3,
        "validation_disable": True,
        "checkpoint_step_interval": 2,
        "checkpoints_total_limit": 3,
        "report_to": "none",
        "eval_timesteps": 3,
    }
    config.update(options)
    if config.get("model_type") == "full":
        del config["lycoris_config"]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "multidatabackend.json").write_text(json.dumps(data, indent=2))
    (folder / "lycoris_config.json").write_text(json.dumps(LYCORIS))
    return folder


def dataset(name: str, **keys: Any) -> dict[str, Any]:
    """One entry over the folder `name`, captions beside the images."""
    entry = {"id": name, "type": "local", "instance_data_dir": name, "caption_strategy": "textfile", "resolution": 64}
    return entry | keys


def load_here(folder: Path, *arguments: str) -> LoadedRun:
    """Load the run of `folder` in this process."""
    return load_run(arguments, {}, folder)


def train_here(folder: Path, *arguments: str, draws_curve: bool = False) -> Path:
    """Train the run of `folder` in this process; returns the output folder.

    Args:
        draws_curve: draw the loss curve, which takes as long as eight tiny steps.
    """
    loaded = load_here(folder, *arguments)
    with pytest.MonkeyPatch.context() as patched:
        if not draws_curve:
            patched.setattr(finish, "plot_loss", lambda metrics, destination: None)
        train(loaded)
    return Path(loaded.config.checkpoint.output_dir)


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, runs of this process get SIGTERM when they have reported a step."""
    report = loop.report_step

    def report_and_signal(run, *arguments):
        report(run, *arguments)
        if run.progress.global_step == step:
            run.session.stop.received = signal.SIGTERM

    monkeypatch.setattr(loop, "report_step", report_and_signal)


def train_in_two(folder: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Like `train_here`, with a SIGTERM after a step and a second start."""
    with monkeypatch.context() as patched:
        stop_after(step, patched)
        with pytest.raises(Interrupted) as caught:
            train_here(folder)
    assert caught.value.exit_code == 143
    return train_here(folder)


def weights_of(checkpoint: Path) -> dict[str, bytes]:
    """Every file of weights of a checkpoint, EMA and optimizer state included, by its relative name."""
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in checkpoint.rglob("*.safetensors")}


def require_same_bits_after_a_stop(
    write: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int = 5
) -> tuple[Path, Path]:
    """Train straight through, and again with a SIGTERM after `step`: last checkpoint and all losses must be equal.

    Args:
        write: makes the run in a folder.

    Returns:
        The two output folders, the undisturbed one first.
    """
    straight = train_here(write(tmp_path / "straight"))
    resumed = train_in_two(write(tmp_path / "stopped"), step, monkeypatch)
    last = max(straight.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    expected = weights_of(last)
    assert expected
    assert weights_of(resumed / last.name) == expected
    losses = [record["loss"] for record in metrics(straight, "step_done")]
    assert [record["loss"] for record in metrics(resumed, "step_done")] == losses
    assert len(losses) == int(last.name.rpartition("-")[2])
    return straight, resumed


def run_cli(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess:
    """`simpletuner ARGUMENTS` in `folder`, as its own process."""
    return subprocess.run(cli(*arguments), cwd=folder, env=environment, capture_output=True, text=True, check=False)


def run_forked(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """As `run_cli`, in a fork of this process, which need not import torch again. For runs that start no processes."""
    streams = [folder / f".forked.{name}" for name in ("stdout", "stderr")]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            for descriptor, path in enumerate(streams, 1):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
            sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
            os.chdir(folder)
            sys.argv = ["simpletuner", *arguments]
            from simpletuner.cli import main

            code = exit_code_of(main)
        except BaseException:  # noqa: BLE001 - as Python itself would, so that a test sees a crash
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    reported = [path.read_text() for path in streams]
    for path in streams:
        path.unlink()
    return subprocess.CompletedProcess(arguments, os.waitstatus_to_exitcode(status), *reported)


def cli(*arguments: str) -> list[str]:
    """The command line of `simpletuner ARGUMENTS` with this Python."""
    return [sys.executable, "-m", "simpletuner", *arguments]


def metrics(output: Path, event: str) -> list[dict[str, Any]]:
    """The records of one kind of event, in order."""
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == event]
