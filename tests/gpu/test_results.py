"""On a GPU: images, gradients, files and resumed runs are what they are on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from simpletuner.adapters.lokr_kernels import fused_kernels, try_kernels
from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.options.optimizer import OptimizerOptions
from simpletuner.errors import ConfigError
from simpletuner.models.devices import pick_device
from simpletuner.optim.optimizers import require_optimizer
from simpletuner.precision.mixed import exact_float32, use_tf32
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.loss_bins import LossBins
from simpletuner.training.step import Losses
from simpletuner.validation.isolation import undisturbed
from tests.runs import cli, metrics, require_same_bits_after_a_stop, train_here, write_run
from tests.unit.validation.test_isolation import ADAPTERS, trained

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("name", ["DoRA", "LoKr, whole factors", "all weights"])
def test_images_of_the_ema_are_those_of_a_model_that_holds_it(name: str) -> None:
    """Point 1 on the device itself."""
    from tests.unit.adapters.conftest import run_stock

    denoiser, adapter, ema = trained(ADAPTERS[name])
    denoiser.to(CUDA)
    ema.averages = {key: value.to(CUDA) for key, value in ema.averages.items()}

    def output() -> Tensor:
        return run_stock(denoiser).float().cpu()

    with undisturbed(denoiser, CUDA, "bf16"):
        output()
        with ema.swapped_in(adapter.trainable_parameters()):
            found = output()
    with ema.swapped_in(adapter.trainable_parameters()), undisturbed(denoiser, CUDA, "bf16"):
        torch.testing.assert_close(found, output())


def gradients(offloads: bool) -> list[Tensor]:
    torch.manual_seed(0)
    blocks = nn.Sequential(
        *(nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64)) for _ in range(4))
    ).to(CUDA)
    recomputing = GradientCheckpointing(CUDA, offloads_inputs=offloads)
    for _ in range(2):
        blocks.zero_grad()
        torch.manual_seed(1)
        x = torch.ones(2, 8, 64, device=CUDA, requires_grad=True)
        for block in blocks:
            x = recomputing(block, x)
        x.square().sum().backward()
    return [parameter.grad.cpu() for parameter in blocks.parameters()]  # type: ignore[union-attr]


def test_parked_inputs_give_the_gradients_of_plain_checkpointing_with_dropout() -> None:
    """Points 2 and 17."""
    for offloaded, plain in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(offloaded, plain, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_an_adapter_of_every_precision_is_written_and_proved(
    precision: str, tmp_path: Path, omnigen_folder: Path
) -> None:
    """Points 3 and 24: the live output is computed without TF32."""
    output = train_here(write_run(tmp_path, omnigen_folder, mixed_precision=precision, max_train_steps=3))
    assert (output / "pytorch_lora_weights.safetensors").is_file()


def test_float32_is_exact_where_it_is_meant_to_be() -> None:
    x, weight = torch.randn(1, 64, 32, 32), torch.randn(64, 64, 3, 3)
    right = nn.functional.conv2d(x.double(), weight.double())

    def error() -> float:
        return float((nn.functional.conv2d(x.to(CUDA), weight.to(CUDA)).cpu().double() - right).abs().max())

    use_tf32(True)
    with exact_float32():
        exact = error()
    assert exact < 1e-3
    if torch.cuda.get_device_capability(CUDA)[0] >= 8:
        assert error() > 3 * exact


def test_kernels_for_lokr_are_tried_and_no_failure_ends_a_run() -> None:
    """Point 8: also without a compiler or Python's headers."""
    kernels = fused_kernels(CUDA)
    if kernels is None:
        pytest.skip("LyCORIS has no kernels for this device")
    trial = try_kernels(((4, 4), (64, 64)), kernels, CUDA, torch.bfloat16)
    assert trial.seconds is not None or trial.reason


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_takes_a_step_or_says_why_not(name: str) -> None:
    """Point 11: at the start of a run, not at its first step."""
    reason = name
    try:
        require_optimizer(OptimizerOptions(optimizer=name, learning_rate=1e-4), CUDA)
    except ConfigError as error:
        reason = error.render()
    assert name in reason


def test_a_deterministic_run_that_is_resumed_has_the_bits_of_one_that_was_not(
    tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Point 12. `simpletuner verify-resume` proves it for a configuration."""

    def write(folder: Path) -> Path:
        return write_run(folder, omnigen_folder, deterministic=True, mixed_precision="bf16")

    require_same_bits_after_a_stop(write, tmp_path, monkeypatch)


def test_the_device_is_the_gpu() -> None:
    """Point 7."""
    assert pick_device() == CUDA


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU")
def test_the_loss_by_noise_level_on_an_apple_gpu() -> None:
    """Point 9."""
    mps = torch.device("mps")
    bins = LossBins()
    bins.add(1, [Losses(torch.ones(2, device=mps), torch.ones(2, device=mps), torch.tensor([0.1, 0.9], device=mps))])
    assert sum(bins._sums()[2]) == 2


def test_compiled_blocks_over_several_sizes_stay_compiled(tmp_path: Path, omnigen_folder: Path) -> None:
    """Point 13 with the real compiler."""
    folder = write_run(tmp_path, omnigen_folder, dynamo_backend="inductor", max_train_steps=4, mixed_precision="bf16")
    result = subprocess.run(cli("train"), cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "recompile_limit" not in result.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("options", [{}, {"fsdp_enable": True}], ids=["copies", "spread"])
def test_two_gpus_train_what_one_trains(options: dict[str, bool], tmp_path: Path, omnigen_folder: Path) -> None:
    """Points 19 to 21."""
    losses = []
    for number in (1, 2):
        folder = write_run(tmp_path / str(number), omnigen_folder, **(options if number == 2 else {}))
        words = cli("train", f"--num_processes={number}", f"--train_batch_size={2 // number}", "--max_train_steps=4")
        result = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False, env=dict(os.environ))
        assert result.returncode == 0, result.stderr
        losses.append([record["loss"] for record in metrics(folder / "output", "step_done")])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_doctor_finds_no_fault_with_the_gpu() -> None:
    """Points 7, 8 and 26."""
    result = subprocess.run([*cli("doctor")], capture_output=True, text=True, check=False, executable=sys.executable)
    assert not [line for line in result.stdout.splitlines() if line.startswith("fault") and "device" in line]
