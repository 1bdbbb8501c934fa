"""Adapters on packed bases in whole runs: they learn, they resume, their files are proved, pictures come of them."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.commands.shapes import empty_batch
from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.options import all_options
from simpletuner.errors import ConfigError, Interrupted
from simpletuner.optim.optimizers import build_optimizer
from simpletuner.precision.linear import QuantisedLinear
from simpletuner.precision.quantise import quantised_layers
from simpletuner.training import loop
from simpletuner.training.step import compute_losses
from simpletuner.training.trainer import attach_adapter, build_family
from tests.runs import load_here, metrics, run_cli, train_here, write_run

PRECISIONS = [name for name in all_options()["base_model_precision"].choices if name != "no_change"]
QUICK = ("int8-quanto", "nf4-bnb")
ADAPTERS = {"lokr": {}, "lora": {"lora_type": "standard", "lycoris_config": None, "lora_rank": 4, "lora_dropout": 0.0}}


def slow_but(names: Iterable[str], quick: Sequence[str]) -> list[Any]:
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def stop_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report = loop.report_step

    def report_and_signal(run, *arguments):
        report(run, *arguments)
        if run.state.global_step == step:
            run.stop.received = signal.SIGTERM

    monkeypatch.setattr(loop, "report_step", report_and_signal)


@pytest.mark.parametrize(
    "precision", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in PRECISIONS]
)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_trains_on_a_packed_base(precision: str, adapter: str, tmp_path: Path, omnigen_folder: Path) -> None:
    loaded = load_here(write_run(tmp_path, omnigen_folder, base_model_precision=precision, **ADAPTERS[adapter]))
    family = build_family(loaded)
    denoiser = family.load_base()
    before = {path: layer.weight for path, layer in quantised_layers(denoiser).items()}
    assert len(before) == 2 * 6
    trained = attach_adapter(loaded, family, denoiser)
    parameters = trained.trainable_parameters()
    optimizer = build_optimizer("adamw", parameters, {"learning_rate": 1e-2})
    batch = empty_batch(family, 64, 64, family.encode_prompts(["a red star", "a blue moon"]))
    noise, quantiles = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    losses = []
    for _ in range(20):
        loss = compute_losses(family, denoiser, batch, noise, quantiles).weighted_sum
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 1e-3
    learning = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    assert len(learning) == len(parameters)
    for path, layer in denoiser.named_modules():
        if isinstance(layer, QuantisedLinear):
            plain = path.replace(".base_layer", "")
            assert torch.equal(layer.weight, before[plain])


@pytest.mark.parametrize(
    "adapter", [name if name == "lokr" else pytest.param(name, marks=pytest.mark.slow) for name in ADAPTERS]
)
def test_a_run_on_a_packed_base_resumes_to_the_same_bits_and_proves_its_file(
    adapter: str, tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"base_model_precision": "int8-quanto", "use_ema": True, "quantize_via": "cpu", **ADAPTERS[adapter]}
    straight = train_here(write_run(tmp_path / "straight", omnigen_folder, **options))
    folder = write_run(tmp_path / "stopped", omnigen_folder, **options)
    stop_after(5, monkeypatch)
    with pytest.raises(Interrupted):
        train_here(folder)
    monkeypatch.undo()
    resumed = train_here(folder)
    for name in ("pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()
    with pytest.raises(ConfigError, match="base_model_precision"):
        train_here(folder, "--base_model_precision=nf4-bnb", "--max_train_steps=9")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"base_model_precision": "int8-torchao"}, {"base_model_default_dtype": "fp32"}]
)
def test_half_precision_trains_with_a_scaled_loss_and_resumes(
    options: dict, tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"mixed_precision": "fp16", "optimizer": "adamw", **options}
    straight = train_here(write_run(tmp_path / "straight", omnigen_folder, **options))
    folder = write_run(tmp_path / "stopped", omnigen_folder, **options)
    stop_after(5, monkeypatch)
    with pytest.raises(Interrupted):
        train_here(folder)
    monkeypatch.undo()
    resumed = train_here(folder)
    names = [path.relative_to(straight) for path in (straight / "checkpoint-8").rglob("*.safetensors")]
    for name in names:
        expected, found = load_file(straight / name), load_file(resumed / name)
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    state = json.loads((straight / "checkpoint-8" / "training_state.json").read_text())
    assert state["loss_scale"]["scale"] <= 2.0**16
    losses = [record["loss"] for record in metrics(straight, "step_done")]
    assert all(loss == loss and loss < 10 for loss in losses)


@pytest.mark.slow
def test_pictures_can_be_drawn_on_a_packed_base(tmp_path: Path, omnigen_folder: Path) -> None:
    arguments = ["generate", "--model", str(omnigen_folder), "--model-family", "omnigen", "--prompt", "a star"]
    arguments += ["--width", "64", "--height", "64", "--steps", "2", "--output", "star.png"]
    done = run_cli(tmp_path, *arguments, "--base-precision", "int8-quanto")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "star.png").is_file()
    refused = run_cli(tmp_path, *arguments, "--base-precision", "int9")
    assert refused.returncode == 2
    assert "allowed: no_change, int8-quanto" in refused.stderr


@pytest.mark.ci
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_one_step_of_every_optimizer_on_every_packed_base(
    precision: str, adapter: str, tmp_path: Path, omnigen_folder: Path
) -> None:
    loaded = load_here(write_run(tmp_path, omnigen_folder, base_model_precision=precision, **ADAPTERS[adapter]))
    family = build_family(loaded)
    batch = empty_batch(family, 64, 64, family.encode_prompts(["a red star"]))
    noise, quantiles = torch.randn(1, 4, 8, 8), torch.full((1,), 0.5, dtype=torch.float64)
    for name in OPTIMIZERS:
        denoiser = family.load_base()
        trained = attach_adapter(loaded, family, denoiser)
        parameters = trained.trainable_parameters()
        with torch.compiler.set_stance("force_eager"):
            optimizer = build_optimizer(name, parameters, {"learning_rate": 1e-2})
            loss = compute_losses(family, denoiser, batch, noise, quantiles).weighted_sum
            loss.backward()
            holders = [key for key, parameter in denoiser.named_parameters() if parameter.grad is not None]
            assert holders
            assert not [key for key in holders if "lokr" not in key and "lora" not in key]
            optimizer.step()
        assert all(torch.isfinite(parameter).all() for parameter in parameters.values()), name
