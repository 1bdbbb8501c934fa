"""Weights, noise levels and rollouts on the real families: a run of the tiny model each, from config.json on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from tests.runs import dataset, metrics, train_here, write_images, write_run
from tests.tiny_folders import TINY_FOLDERS

ROLLOUTS = {"scheduled_sampling_max_step_offset": 2, "scheduled_sampling_probability": 1.0}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "sdxl: min-SNR": ("sdxl", {"snr_gamma": 5}),
    "flux: min-SNR": ("flux", {"snr_gamma": 5}),
    "sdxl: huber": ("sdxl", {"loss_type": "huber"}),
    "sdxl: rollouts": ("sdxl", ROLLOUTS),
    "sdxl: bias": ("sdxl", {"timestep_bias_strategy": "earlier", "timestep_bias_multiplier": 4}),
    "flux: shift": ("flux", {"flow_schedule_shift": 5}),
    "flux: uniform": ("flux", {"flow_use_uniform_schedule": True, "flow_schedule_auto_shift": True}),
    "flux: beta": ("flux", {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 4}),
    "flux: mode, terminal": ("flux", {"flow_use_mode_schedule": True, "flow_schedule_terminal": 0.1}),
    "flux: strata, weights": ("flux", {"timestep_stratified": True, "flow_loss_weighting": "cosmap"}),
    "flux: chosen": ("flux", {"flow_custom_timesteps": "1000, 750, 500"}),
    "flux: rollouts": ("flux", ROLLOUTS | {"scheduled_sampling_sampler": "dpm"}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: TINY_FOLDERS[name](tmp_path_factory.mktemp(name)) for name in ("sdxl", "flux")}


def losses_of(folder: Path, model: Path, family: str, **options: Any) -> list[float]:
    write_images(folder / "images", 4, seed=1)
    write_run(folder, model, [dataset("images")], model_family=family, max_train_steps=2, **options)
    return [record["loss"] for record in metrics(train_here(folder), "step_done")]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_each_family_trains_with_it_and_otherwise_than_without(models, tmp_path: Path, name: str) -> None:
    family, options = RUNS[name]
    plain = losses_of(tmp_path / "plain", models[family], family)
    changed = losses_of(tmp_path / "changed", models[family], family, **options)
    assert all(0 < loss < 100 for loss in changed), changed
    assert plain[0] != changed[0]
    if "snr_gamma" in options or "loss_type" in options:  # no weight is above 1, and no Huber error above the square
        assert changed[0] < plain[0]
    if options.items() >= ROLLOUTS.items():
        steps = metrics(tmp_path / "changed" / "output", "step_done")
        assert all(step["extra"]["rollout_depth"] in (1, 2) for step in steps)


@pytest.mark.parametrize("family", ["sdxl", "flux", "omnigen"])
def test_estimates_are_the_inverse_of_noise_and_target(models, tmp_path: Path, omnigen_folder, family: str) -> None:
    """What a perfect prediction amounts to is the data, whatever the family predicts; rollouts stand on it."""
    import torch

    spec = get_spec(family)
    source = ModelSource(str(models.get(family, omnigen_folder)))
    bound = get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)
    latents, noise = torch.randn(2, 2, spec.latent_channels, 4, 4).unbind(0)
    sigmas = bound.sigmas_at(torch.tensor([0.3, 0.7], dtype=torch.float64), latents)
    noisy, target = bound.make_noisy(latents, noise, sigmas), bound.make_target(latents, noise, sigmas)
    torch.testing.assert_close(bound.estimate_data(noisy, target, sigmas), latents, rtol=0, atol=1e-3)
    signal, amount = (each[:, None, None, None] for each in bound.signal_and_noise(sigmas))
    torch.testing.assert_close(signal * latents + amount * noise, noisy, rtol=0, atol=1e-5)
