"""Every optimizer trains the tiny model; runs with each kind of state resume to the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.adapters.build import attach_adapter
from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.options.optimizer import OptimizerOptions
from simpletuner.errors import ConfigError
from simpletuner.models.build import build_family
from simpletuner.optim.optimizers import averaged_weights, build_optimizer
from simpletuner.training.planning.shapes import empty_batch
from simpletuner.training.step import compute_losses, sample_noise
from tests.runs import load_here, metrics, require_same_bits_after_a_stop, slow_but, train_here, write_run

# Learning rates at which a tiny adapter visibly learns; where none stands, that of AdamW.
ADAMW_RATE = 2e-2
RATES = {
    "torch-sgd": 1.0,
    "optimi-sgd": 1.0,
    "torch-asgd": 1.0,
    "torch-adadelta": 5.0,
    "torch-adafactor": 0.5,
    "prodigy": 1.0,
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, omnigen_folder: Path) -> Path:
    return write_run(tmp_path_factory.mktemp("run"), omnigen_folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", slow_but(OPTIMIZERS, ("adamw_bf16", "adamw", "adamw_schedulefree", "prodigy")))
def test_every_optimizer_trains_the_tiny_model(name: str, run_folder: Path) -> None:
    loaded = load_here(run_folder)
    family = build_family(loaded.config)
    denoiser = family.load_denoiser()
    adapter = attach_adapter(loaded, family, denoiser)
    parameters = adapter.trainable_parameters()
    config = {"learning_rate": RATES.get(name, ADAMW_RATE / 4 if "lion" in name else ADAMW_RATE)}
    batch = empty_batch(family, 64, 64, family.encode_prompts(["a red star", "a blue moon"]))
    noise, quantiles = sample_noise(batch, 0, 0), torch.full((2,), 0.5, dtype=torch.float64)
    losses = []
    with torch.compiler.set_stance("force_eager"):
        optimizer = build_optimizer(
            OptimizerOptions(optimizer=name, **(config | {"optimizer_config": None})), parameters
        )
        for _ in range(40):
            with torch.no_grad(), averaged_weights(optimizer):
                losses.append(float(compute_losses(family, denoiser, batch, noise, quantiles).weighted_sum))
            compute_losses(family, denoiser, batch, noise, quantiles).weighted_sum.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.isfinite(parameter).all() for parameter in parameters.values())
    assert losses[-1] < losses[0] - 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    slow_but(("adamw_schedulefree", "bnb-lion8bit-paged", "prodigy", "muon", "soap"), ("adamw_schedulefree",)),
)
def test_a_run_resumes_to_the_same_bits(name: str, tmp_path: Path, omnigen_folder: Path, monkeypatch) -> None:
    options = {"optimizer": name, "learning_rate": 1.0 if name == "prodigy" else 1e-2}
    require_same_bits_after_a_stop(lambda folder: write_run(folder, omnigen_folder, **options), tmp_path, monkeypatch)


def test_settings_that_an_optimizer_refuses_end_the_start_before_anything_is_cached(
    tmp_path: Path, omnigen_folder: Path
) -> None:
    folder = write_run(tmp_path / "run", omnigen_folder, optimizer_config={"betas": [0.9, 2]})
    with pytest.raises(ConfigError, match="refuses its settings"):
        train_here(folder)
    assert not (folder / "cache").exists()


def test_checkpoints_and_results_of_schedule_free_hold_the_average(tmp_path: Path, omnigen_folder: Path) -> None:
    output = train_here(write_run(tmp_path / "run", omnigen_folder, optimizer="adamw_schedulefree"))
    checkpoint = output / "checkpoint-8"
    averaged = load_file(checkpoint / "pytorch_lora_weights.safetensors")
    trained = load_file(checkpoint / "trainable.safetensors")
    state = load_file(checkpoint / "optimizer.safetensors")
    final = load_file(output / "pytorch_lora_weights.safetensors")
    for name, y in trained.items():
        assert torch.equal(final[name], averaged[name])
        # y = (1 - beta1) z + beta1 x, in the words of the paper.
        torch.testing.assert_close(y, 0.1 * state[f"{name}//z"] + 0.9 * averaged[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_rate_scales_with_the_images_of_a_step(tmp_path: Path, omnigen_folder: Path) -> None:
    options = {"max_train_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "lr_scale": True}
    plain = train_here(write_run(tmp_path / "plain", omnigen_folder, **options))
    root = train_here(write_run(tmp_path / "root", omnigen_folder, **options, lr_scale_sqrt=True))
    rates = [metrics(output, "step_done")[0]["learning_rate"] for output in (plain, root)]
    assert rates == pytest.approx([4e-3, 2e-3])


@pytest.mark.ci
@pytest.mark.parametrize("name", [name for name, row in OPTIMIZERS.items() if row.compiles])
def test_a_compiled_step_trains_in_a_run(name: str, tmp_path: Path, omnigen_folder: Path) -> None:
    output = train_here(write_run(tmp_path / "run", omnigen_folder, optimizer=name, max_train_steps=3))
    assert len(metrics(output, "step_done")) == 3
