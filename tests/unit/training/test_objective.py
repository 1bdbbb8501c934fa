"""What the configuration adds to the objective: noise, levels, weights; and that the eval loss sees none of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.diffusion.timesteps import shifted_sigmas
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.training.objective import PLAIN, Objective, SigmaSchedule, TimestepBias, build_objective
from tests.runs import dataset, draw_pictures, load_here, metrics, train_here, write_run

SLOTS = range(400)


@pytest.fixture
def family(omnigen_folder: Path) -> OmniGen:
    return OmniGen(OMNIGEN, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)


def quantiles(count: int = 4) -> torch.Tensor:
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def test_the_family_s_own_levels_stay_where_nothing_is_set(family: OmniGen) -> None:
    latents = torch.zeros(4, 4, 8, 8)
    assert torch.equal(PLAIN.sigmas_at(family, quantiles(), latents), family.sigmas_at(quantiles(), latents))


def test_the_shift_follows_the_number_of_tokens(family: OmniGen) -> None:
    """32 x 32 latents are 256 tokens: e^0.5 = 1.648721, and 0.5 becomes 1.648721 * 0.5 / (1 + 0.648721 * 0.5)."""
    schedule = SigmaSchedule("uniform", shifts_by_size=True)
    sigmas = schedule.sigmas_at(family, torch.tensor([0.5]), torch.zeros(1, 4, 32, 32))
    assert sigmas.item() == pytest.approx(0.622459, abs=1e-5)
    larger = schedule.sigmas_at(family, torch.tensor([0.5]), [torch.zeros(4, 128, 128)])
    assert larger.item() == pytest.approx(2.71828**1.15 / (1 + 2.71828**1.15), abs=1e-4)


def test_where_no_shift_is_written_the_family_s_own_stays(family: OmniGen, monkeypatch) -> None:
    """A family that shifts by 3 shifts uniform levels too: 0.5 becomes 0.75. A shift of 1 is none."""
    own = family.sigmas_at
    monkeypatch.setattr(family, "sigmas_at", lambda q, x: shifted_sigmas(own(q, x), 3.0))
    half, latents = torch.tensor([0.5], dtype=torch.float64), torch.zeros(1, 4, 2, 2)
    assert SigmaSchedule("uniform").sigmas_at(family, half, latents).item() == pytest.approx(0.75, abs=1e-6)
    assert SigmaSchedule("uniform", shift=1.0).sigmas_at(family, half, latents).item() == pytest.approx(0.5, abs=1e-6)
    assert SigmaSchedule("uniform", shift=9.0).sigmas_at(family, half, latents).item() == pytest.approx(0.9, abs=1e-6)


def test_a_bias_draws_some_levels_more_often(family: OmniGen) -> None:
    objective = Objective(schedule=SigmaSchedule("uniform"), bias=TimestepBias(0.5, 1.0, 3.0))
    sigmas = objective.sigmas_at(family, quantiles(1000), torch.zeros(1000, 4, 2, 2))
    assert ((sigmas > 0.5).double().mean().item()) == pytest.approx(0.75, abs=0.005)


def test_offset_noise_adds_one_number_for_each_channel_to_some_pictures() -> None:
    noise = torch.randn(len(SLOTS), 2, 4, 4, generator=torch.Generator().manual_seed(0))
    objective = Objective(noise_offset=0.5, noise_offset_probability=0.25)
    added = objective.offset_noise(noise, SLOTS, 1, 0) - noise
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-6)
    offsets = added[:, :, 0, 0]
    moved = offsets.abs().sum(dim=1) > 1e-6
    assert moved.double().mean().item() == pytest.approx(0.25, abs=0.06)
    assert offsets[moved].std().item() == pytest.approx(0.5, rel=0.15)
    rows = objective.offset_noise(list(noise), SLOTS, 1, 0)
    assert torch.equal(torch.stack(rows), objective.offset_noise(noise, SLOTS, 1, 0))
    assert not torch.equal(objective.offset_noise(noise, SLOTS, 1, 1) - noise, added)


def test_perturbation_falls_to_nothing_over_its_steps() -> None:
    noise = torch.zeros(len(SLOTS), 1, 4, 4)
    objective = Objective(input_perturbation=0.1, input_perturbation_steps=10)
    sizes = [objective.perturbed_noise(noise, SLOTS, 1, step) for step in (0, 5, 10)]
    assert sizes[0].std().item() == pytest.approx(0.1, rel=0.05)
    assert sizes[1].std().item() == pytest.approx(0.05, rel=0.05)
    assert sizes[2] is None
    assert Objective(input_perturbation=0.1).perturbed_noise(noise, SLOTS, 1, 10**6) is not None
    assert PLAIN.perturbed_noise(noise, SLOTS, 1, 0) is None


SETTINGS = {
    "huber": {"loss_type": "huber", "huber_c": 0.5, "huber_schedule": "constant"},
    "smooth l1": {"loss_type": "smooth_l1", "huber_schedule": "exponential"},
    "offset noise": {"offset_noise": True, "noise_offset": 0.3, "noise_offset_probability": 1.0},
    "input perturbation": {"input_perturbation": 0.5},
    "timestep bias": {"timestep_bias_strategy": "later", "timestep_bias_multiplier": 5, "timestep_bias_portion": 0.5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_trains_differs_and_leaves_the_eval_loss_of_the_start_alone(
    tmp_path, omnigen_folder, name
) -> None:
    runs = []
    for folder, options in ((tmp_path / "plain", {}), (tmp_path / "set", SETTINGS[name])):
        draw_pictures(folder / "pictures", 4, seed=1)
        draw_pictures(folder / "held_out", 2, seed=2)
        data = [dataset("pictures"), dataset("held_out", dataset_type="eval")]
        write_run(folder, omnigen_folder, data, max_train_steps=3, eval_steps_interval=3, **options)
        runs.append(train_here(folder))
    losses = [[record["loss"] for record in metrics(output, "step_done")] for output in runs]
    assert all(a != b for a, b in zip(*losses, strict=True))
    evals = [[record["pooled"] for record in metrics(output, "eval_done")] for output in runs]
    assert evals[0][0] == evals[1][0]
    assert evals[0][-1] != evals[1][-1]


def test_defaults_are_the_plain_objective(tmp_path, omnigen_folder) -> None:
    assert build_objective(load_here(write_run(tmp_path, omnigen_folder)).config) == PLAIN
