"""What the configuration adds to the objective: noise, levels, weights; and that the eval loss sees none of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from simpletuner.diffusion.timesteps import shifted_sigmas
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.randomness import keyed_seed
from simpletuner.training.losses.huber import Huber
from simpletuner.training.losses.smooth_l1 import SmoothL1
from simpletuner.training.objective import PLAIN, Objective, SigmaSchedule, TimestepBias, build_objective
from tests.runs import dataset, load_here, metrics, train_here, write_images, write_run
from tests.toy import ToyFamily, load_toy

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
    larger = schedule.sigmas_at(family, torch.tensor([0.5]), torch.zeros(1, 4, 128, 128))
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


def test_offset_noise_adds_one_number_for_each_channel_to_some_images() -> None:
    noise = torch.randn(len(SLOTS), 2, 4, 4, generator=torch.Generator().manual_seed(0))
    objective = Objective(noise_offset=0.5, noise_offset_probability=0.25)
    added = objective.offset_noise(noise, SLOTS, 1, 0) - noise
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-6)
    offsets = added[:, :, 0, 0]
    moved = offsets.abs().sum(dim=1) > 1e-6
    assert moved.double().mean().item() == pytest.approx(0.25, abs=0.06)
    assert offsets[moved].std().item() == pytest.approx(0.5, rel=0.15)
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


def losses_of(folder: Path, model: Path, **options: object) -> tuple[list[float], list[float]]:
    """Those of three steps, and the eval losses before and after them."""
    write_images(folder / "images", 4, seed=1)
    write_images(folder / "held_out", 2, seed=2)
    data = [dataset("images"), dataset("held_out", dataset_type="eval")]
    output = train_here(write_run(folder, model, data, max_train_steps=3, eval_steps_interval=3, **options))
    steps = [record["loss"] for record in metrics(output, "step_done")]
    return steps, [record["pooled"] for record in metrics(output, "eval_done")]


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory: pytest.TempPathFactory, omnigen_folder: Path) -> tuple[list[float], list[float]]:
    return losses_of(tmp_path_factory.mktemp("plain"), omnigen_folder)


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_trains_differs_and_leaves_the_eval_loss_of_the_start_alone(
    tmp_path: Path, omnigen_folder: Path, plain_losses: tuple[list[float], list[float]], name: str
) -> None:
    steps, evals = losses_of(tmp_path, omnigen_folder, **SETTINGS[name])
    assert all(one != other for one, other in zip(steps, plain_losses[0], strict=True))
    assert evals[0] == plain_losses[1][0]
    assert evals[-1] != plain_losses[1][-1]


def test_defaults_are_the_plain_objective(tmp_path, omnigen_folder) -> None:
    assert build_objective(load_here(write_run(tmp_path, omnigen_folder)).config) == PLAIN


def objective_of(tmp_path: Path, **options) -> Objective:
    return build_objective(load_toy(tmp_path, **options).config)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"timestep_bias_strategy": "earlier", "timestep_bias_portion": 0.25}, (0, 0.25)),
        ({"timestep_bias_strategy": "later", "timestep_bias_portion": 0.25}, (0.75, 1)),
        ({"timestep_bias_strategy": "range", "timestep_bias_begin": 200, "timestep_bias_end": 600}, (0.2, 0.6)),
    ],
)
def test_a_bias_covers_the_portion_that_is_written(tmp_path, options, expected) -> None:
    bias = objective_of(tmp_path, timestep_bias_multiplier=3, **options).bias
    assert (bias.low, bias.high) == pytest.approx(expected)
    assert bias.multiplier == 3


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({"flow_use_uniform_schedule": True}, SigmaSchedule("uniform")),
        (
            {"flow_use_beta_schedule": True, "flow_beta_schedule_alpha": 3.0, "flow_beta_schedule_beta": 1.5},
            SigmaSchedule("beta", alpha=3.0, beta=1.5),
        ),
        ({"flow_sigmoid_scale": 0.5}, SigmaSchedule("logit_normal", 0.5)),
        ({"flow_logit_mean": -0.5}, SigmaSchedule("logit_normal", mean=-0.5)),
        ({"flow_use_mode_schedule": True, "flow_mode_scale": 0.5}, SigmaSchedule("mode", mode_scale=0.5)),
        ({"flow_schedule_terminal": 0.02}, SigmaSchedule("family", terminal=0.02)),
        ({"flow_schedule_shift": 3.0}, SigmaSchedule("logit_normal", shift=3.0)),
        (
            {"flow_schedule_shift": 3.0, "flow_use_uniform_schedule": True},
            SigmaSchedule("uniform", shift=3.0),
        ),
        (
            {"flow_schedule_auto_shift": True, "flow_schedule_auto_shift_curve": "sqrt"},
            SigmaSchedule("logit_normal", shifts_by_size=True, curve="sqrt"),
        ),
        ({"flow_custom_timesteps": "0.5,1"}, SigmaSchedule("custom", values=(0.5, 1.0))),
        ({"flow_custom_timesteps": "250,500"}, SigmaSchedule("custom", values=(0.25, 0.5))),
        ({}, SigmaSchedule()),
    ],
)
def test_a_schedule_is_the_one_that_is_written(tmp_path, options, schedule) -> None:
    assert objective_of(tmp_path, **options).schedule == schedule


def test_every_other_setting_is_read(tmp_path) -> None:
    plain = load_toy(tmp_path).config
    written = {
        "loss_type": "huber",
        "huber_schedule": "exponential",
        "huber_c": 0.25,
        "snr_gamma": 5.0,
        "offset_noise": True,
        "noise_offset": 0.5,
        "noise_offset_probability": 0.75,
        "input_perturbation": 0.125,
        "input_perturbation_steps": 9,
        "timestep_stratified": True,
        "flow_loss_weighting": "cosmap",
    }
    found = build_objective(plain.with_values(written))
    expected = Objective(Huber("exponential", 0.25), 5.0, 0.5, 0.75, 0.125, 9, is_stratified=True, weighting="cosmap")
    assert found == expected
    off = {"offset_noise": False, "noise_offset": 0.5, "snr_gamma": 0.0}
    assert build_objective(plain.with_values(off)).noise_offset == 0
    assert build_objective(plain.with_values(off)).snr_gamma is None


def test_chosen_levels_are_equally_likely_and_by_size() -> None:
    family, latents = ToyFamily(), torch.zeros(4, 2, 1, 1)
    schedule = SigmaSchedule("custom", values=(1.0, 0.25))
    assert schedule.sigmas_at(family, quantiles(4), latents).tolist() == [0.25, 0.25, 1.0, 1.0]


def test_the_deviation_of_a_logit_normal_schedule_is_its_scale() -> None:
    """The quantile of one standard deviation, 0.8413, is at a logit of `scale`."""
    schedule = SigmaSchedule("logit_normal", 0.5, shift=1.0)
    sigma = schedule.sigmas_at(ToyFamily(), torch.tensor([0.841344746]), torch.zeros(1, 2, 1, 1)).item()
    assert sigma == pytest.approx(1 / (1 + 2.718281828**-0.5), abs=1e-5)


def test_the_mean_of_a_logit_normal_schedule_is_the_logit_of_its_middle() -> None:
    """The middle is sigmoid(1) = 0.731059: a mean above 0 is more noise."""
    schedule = SigmaSchedule("logit_normal", mean=1.0, shift=1.0)
    half = torch.tensor([0.5], dtype=torch.float64)
    assert schedule.sigmas_at(ToyFamily(), half, torch.zeros(1, 2, 1, 1)).item() == pytest.approx(0.731059, abs=1e-6)


@pytest.mark.parametrize("kind", ["family", "uniform"])
def test_a_terminal_is_the_least_level_after_any_shift(kind) -> None:
    """Of a shift of 3, 0.5 becomes 0.75; spread over what is above 0.2 that is 1 - 0.25 * 0.8 = 0.8."""
    half, latents = torch.tensor([0.5], dtype=torch.float64), torch.zeros(1, 2, 1, 1)
    assert SigmaSchedule(kind, terminal=0.2).sigmas_at(ToyFamily(), half, latents).item() == pytest.approx(0.6)
    schedule = SigmaSchedule("uniform", shift=3.0, terminal=0.2)
    assert schedule.sigmas_at(ToyFamily(), half, latents).item() == pytest.approx(0.8)


def test_the_shift_by_size_follows_the_chosen_curve(family: OmniGen) -> None:
    """80 x 80 latents are 1600 tokens, whose root divided by 20 is 2: the middle becomes 2/3."""
    schedule = SigmaSchedule("uniform", shifts_by_size=True, curve="sqrt")
    sigma = schedule.sigmas_at(family, torch.tensor([0.5]), torch.zeros(1, 4, 80, 80)).item()
    assert sigma == pytest.approx(2 / 3, abs=1e-6)


def test_losses_are_multiplied_by_the_weights_of_their_levels() -> None:
    losses, sigmas = torch.tensor([2.0, 2.0]), torch.tensor([0.5, 1.0])
    weighted = Objective(weighting="sigma_sqrt").weighted(ToyFamily(), losses, sigmas)
    assert weighted.tolist() == [8, 2]


def test_errors_and_weights_of_levels_by_hand() -> None:
    """At sigma 0.25 the signal is 0.75 and the noise 0.25, their ratio 3, its square 9."""
    family, sigmas = ToyFamily(), torch.tensor([0.25])
    prediction, target = torch.full((1, 2, 1, 1), 3.0), torch.zeros(1, 2, 1, 1)
    limits = {"constant": 0.5, "exponential": 0.5**0.25, "snr": 0.5 / (1 + 1 / 3) ** 2 + 0.5}
    for schedule, c in limits.items():
        huber = Huber(schedule, 0.5).errors(family, prediction, target, sigmas)
        assert huber[0, 0, 0, 0].item() == pytest.approx(2 * c * ((9 + c * c) ** 0.5 - c), rel=1e-5)
        smooth = SmoothL1(schedule, 0.5).errors(family, prediction, target, sigmas)
        assert smooth[0, 0, 0, 0].item() == pytest.approx(2 * ((9 + c * c) ** 0.5 - c), rel=1e-5)
    assert PLAIN.loss.errors(family, prediction, target, sigmas).flatten().tolist() == [9, 9]
    assert PLAIN.weighted(family, torch.tensor([3.0, 2.0]), torch.tensor([0.1, 0.9])).tolist() == [3, 2]
    # A velocity: the error of the data is sigma^2 times its own, and counts min(9, 5) times.
    for gamma, weight in ((5.0, 5 / 8), (20.0, 9 / 8)):
        found = Objective(snr_gamma=gamma).weighted(family, torch.tensor([2.0]), sigmas)
        assert found.item() == pytest.approx(weight, rel=1e-5)


def test_offset_and_perturbation_are_those_of_their_slot_and_step() -> None:
    noise = torch.zeros(2, 3, 2, 2)
    objective = Objective(noise_offset=0.5, noise_offset_probability=1.0, input_perturbation=0.25)
    for make, name in ((objective.offset_noise, "noise offset"), (objective.perturbed_noise, "input")):
        rows = make(noise, [4, 9], 7, 3)
        for row, slot in zip(rows, (4, 9), strict=True):
            generator = torch.Generator().manual_seed(keyed_seed(7, name, 3, slot))
            shape = (3, 1, 1) if name == "noise offset" else (3, 2, 2)
            amount = 0.5 if name == "noise offset" else 0.25
            torch.testing.assert_close(row, (amount * torch.randn(shape, generator=generator)).expand(3, 2, 2))


def test_the_size_decides_the_shift_where_both_are_asked_for() -> None:
    """80 x 80 latents of patches of 1 are 6400: their root divided by 20 is 4, and the middle becomes 4/5."""
    schedule = SigmaSchedule("uniform", shift=3.0, shifts_by_size=True, curve="sqrt")
    patches = 80 // ToyFamily().spec.patch_size
    found = schedule.sigmas_at(ToyFamily(), torch.tensor([0.5]), torch.zeros(1, 2, 80, 80)).item()
    assert found == pytest.approx((patches / 20) / (1 + patches / 20))


def test_both_weights_of_a_level_count() -> None:
    """At sigma 0.25: 1 / sigma^2 is 16, and min(9, 5) times sigma^2 is 5/16."""
    both = Objective(weighting="sigma_sqrt", snr_gamma=5.0)
    assert both.weighted(ToyFamily(), torch.tensor([2.0]), torch.tensor([0.25])).item() == pytest.approx(10)
