"""What makes two starts of a run equal: kernels that are fixed, arithmetic that is named, choices that are kept."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.adapters import lokr_kernels, lycoris
from simpletuner.adapters.files import allowed_difference
from simpletuner.adapters.lokr import KronKernels
from simpletuner.errors import ConfigError
from simpletuner.models.build import build_family
from simpletuner.precision.mixed import deterministic_kernels, exact_float32, use_tf32
from simpletuner.training import adapter_roundtrip, trainer
from tests.runs import load_here, metrics, train_here, write_run

CUDA = torch.backends.cuda.matmul
PLACES = (CUDA, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)


def precisions() -> set[str]:
    return {place.fp32_precision for place in PLACES}


def test_the_option_sets_all_that_torch_has_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic_kernels(False):
        assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # of whoever calls
    try:
        with deterministic_kernels(True):
            pass
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)


def test_a_run_under_the_option_trains_with_it(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    run_training = trainer.run_training
    monkeypatch.setattr(
        trainer,
        "run_training",
        lambda run: seen.append(torch.are_deterministic_algorithms_enabled()) or run_training(run),
    )
    for deterministic in (True, False):
        train_here(
            write_run(tmp_path / str(deterministic), omnigen_folder, deterministic=deterministic, max_train_steps=1)
        )
    assert seen == [True, False]


def test_kernels_that_inductor_times_are_refused_under_it(tmp_path: Path, omnigen_folder: Path) -> None:
    folder = write_run(tmp_path, omnigen_folder, deterministic=True, dynamo_backend="inductor")
    with pytest.raises(ConfigError, match="deterministic: inductor chooses its kernels by timing"):
        load_here(folder)


@pytest.mark.parametrize(("disabled", "precision"), [(True, "ieee"), (False, "tf32")])
def test_float32_of_every_kind_is_named(disabled: bool, precision: str, tmp_path: Path, omnigen_folder: Path) -> None:
    build_family(load_here(write_run(tmp_path, omnigen_folder, disable_tf32=disabled)).config)
    assert precisions() == {precision}


def test_latents_are_encoded_in_exact_float32(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = build_family(load_here(write_run(tmp_path, omnigen_folder)).config)
    vae, seen = family.load_vae(), []
    encode = vae.encode
    monkeypatch.setattr(vae, "encode", lambda pixels: seen.append(precisions()) or encode(pixels))
    family.encode_images(vae, torch.zeros(1, 3, 64, 64))
    assert seen == [{"ieee"}]
    assert precisions() == {"tf32"}


def test_the_proof_of_a_file_computes_the_live_output_in_exact_float32(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU would round convolutions to TF32, and the reload on the CPU would differ by more than is allowed."""
    seen = []
    probe = adapter_roundtrip.probe_output

    def watched(family: Any, denoiser: Any) -> Tensor:
        seen.append((precisions(), denoiser.training))
        return probe(family, denoiser)

    monkeypatch.setattr(adapter_roundtrip, "probe_output", watched)
    train_here(write_run(tmp_path, omnigen_folder, max_train_steps=1))
    assert seen[:2] == [({"ieee"}, False)] * 2  # and dropout is off
    use_tf32(True)
    with exact_float32():
        assert precisions() == {"ieee"}
    assert precisions() == {"tf32"}


def test_what_two_devices_may_differ_by_follows_from_the_base_and_the_change() -> None:
    base, change = torch.zeros(4), torch.tensor([0.0, 8.0, 0.0, 0.0])
    tight = 1e-5
    assert allowed_difference(tight, base + 1e-3, base, base) == pytest.approx(tight)  # small change, same device
    assert allowed_difference(tight, change, base, base) == pytest.approx(8e-3)  # a large one rounds more
    assert allowed_difference(tight, base, base, base + 1e-5) == pytest.approx(4e-5)  # another device
    assert allowed_difference(tight, base, base, base + 1.0) == pytest.approx(1e-4)  # another base is no rounding


@pytest.mark.slow
def test_a_strong_adapter_is_written(tmp_path: Path, omnigen_folder: Path) -> None:
    """Its rounding grows with what it changes."""
    folder = write_run(tmp_path, omnigen_folder, learning_rate=0.5, max_train_steps=12)
    assert (train_here(folder) / "pytorch_lora_weights.safetensors").is_file()


# ---- choices made by timing ----------------------------------------------------------------------------------------


def stand_in() -> KronKernels:
    def forward(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        return x @ torch.kron(w1, w2).T

    def backward(gradient: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs = [each.detach().requires_grad_() for each in (x, w1, w2)]
        with torch.enable_grad():
            return torch.autograd.grad(forward(*inputs), inputs, gradient)

    return KronKernels("stand-in", forward, backward)


@pytest.fixture
def timings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, float]]:
    """What the next trials take; each is used up."""
    times: list[tuple[float, float]] = []
    monkeypatch.setattr(lycoris, "fused_kernels", lambda device: stand_in())
    monkeypatch.setattr(lokr_kernels, "NUM_ROWS", 16)
    monkeypatch.setattr(lokr_kernels, "median_seconds", lambda ways, device: times.pop(0))
    return times


def test_a_resumed_run_keeps_the_kernels_of_its_checkpoint(
    tmp_path: Path, omnigen_folder: Path, timings: list[tuple[float, float]]
) -> None:
    folder = write_run(tmp_path, omnigen_folder, max_train_steps=2)
    timings += [(2.0, 1.0), (1.0, 2.0), (2.0, 1.0), (1.0, 2.0)]
    output = train_here(folder)
    choice = json.loads((output / "checkpoint-2" / "training_state.json").read_text())["kernels"]
    assert set(choice.values()) == {True, False}
    timings.clear()  # from now on a trial that is timed fails
    train_here(folder, "--max_train_steps=4")
    assert json.loads((output / "checkpoint-4" / "training_state.json").read_text())["kernels"] == choice
    reported = [record["text"] for record in metrics(output, "notice")]
    assert sum("as the checkpoint or the main process says" in line for line in reported) == len(choice)


def test_a_deterministic_run_computes_its_own_products(
    tmp_path: Path, omnigen_folder: Path, timings: list[tuple[float, float]]
) -> None:
    """LyCORIS' kernels for small factors add up atomically."""
    output = train_here(write_run(tmp_path, omnigen_folder, max_train_steps=1, deterministic=True))
    assert json.loads((output / "checkpoint-1" / "training_state.json").read_text())["kernels"] == {}
