"""Distributions of noise levels, against closed forms and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from simpletuner.diffusion.timesteps import (
    beta_sigmas,
    biased_quantiles,
    chosen_sigmas,
    fixed_quantiles,
    interpolate,
    level_weights,
    logit_normal_quantiles,
    logit_normal_sigmas,
    mode_sigmas,
    scheduler_shift,
    shift_of_size,
    shifted_sigmas,
    stretched_sigmas,
    uniform_sigmas,
)

QUANTILES = torch.linspace(0.001, 0.999, 97, dtype=torch.float64)


@pytest.mark.parametrize(
    ("alpha", "beta", "quantile"),
    [
        (1.0, 1.0, lambda q: q),
        (0.5, 0.5, lambda q: torch.sin(math.pi * q / 2) ** 2),
        (1.0, 3.0, lambda q: 1 - (1 - q) ** (1 / 3)),
        (4.0, 1.0, lambda q: q**0.25),
    ],
)
def test_beta_quantiles_are_those_of_the_closed_forms(alpha, beta, quantile) -> None:
    expected = quantile(QUANTILES).float()
    torch.testing.assert_close(beta_sigmas(QUANTILES, alpha, beta), expected, rtol=0, atol=2e-5)


def test_beta_of_two_and_two_is_the_smooth_step_turned_round() -> None:
    # Its distribution function is 3 x^2 - 2 x^3: a quarter of the mass below the root at 0.326352.
    sigmas = beta_sigmas(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 2, 2)
    torch.testing.assert_close(sigmas, torch.tensor([0.326352, 0.5, 0.673648]), rtol=0, atol=2e-5)


def test_a_shift_of_three_moves_the_middle_to_three_quarters() -> None:
    sigmas = torch.tensor([0.0, 0.25, 0.5, 1.0])
    assert shifted_sigmas(sigmas, 3.0).tolist() == pytest.approx([0, 0.5, 0.75, 1])
    assert shifted_sigmas(sigmas, 1.0).tolist() == sigmas.tolist()


def test_the_shift_of_a_size_is_that_of_flux() -> None:
    # mu is 0.5 at 256 tokens and 1.15 at 4096; in the middle, at 2176, 0.825.
    assert [shift_of_size(n) for n in (256, 2176, 4096)] == pytest.approx([math.exp(m) for m in (0.5, 0.825, 1.15)])


def test_the_shift_that_grows_with_the_root_is_the_root_divided_by_twenty() -> None:
    assert [shift_of_size(n, "sqrt") for n in (400, 1024, 4096)] == pytest.approx([1.0, 1.6, 3.2])


def test_a_stretch_leaves_noise_and_moves_the_least_level_to_its_end() -> None:
    sigmas = stretched_sigmas(torch.tensor([0.0, 0.5, 1.0]), 0.02)
    assert sigmas.tolist() == pytest.approx([0.02, 0.51, 1.0])


def test_a_stretched_grid_is_that_of_diffusers_but_for_its_last_sigma() -> None:
    """Their grid of 1000 ends at a thousandth, shifted; ours at 0: no level differs by more than that."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift_terminal=0.02, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192
    )
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1e-3, 1000).tolist(), mu=0.5)
    ours = stretched_sigmas(shifted_sigmas(torch.linspace(1, 1e-3, 1000), math.exp(0.5)), 0.02)
    torch.testing.assert_close(scheduler.sigmas[:-1], ours, rtol=0, atol=math.exp(0.5) * 1e-3)


def test_mode_sampling_by_hand() -> None:
    """At a quarter cos^2 is (2 + sqrt(2)) / 4 = 0.853553; with a scale of 1 that adds 0.103553. 0 is uniform."""
    quarters = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    assert mode_sigmas(quarters, 1.0).tolist() == pytest.approx([0, 0.353553, 0.5, 0.646447, 1], abs=1e-6)
    assert mode_sigmas(quarters, 0.0).tolist() == pytest.approx(quarters.tolist(), abs=1e-7)
    assert (mode_sigmas(QUANTILES, 1.29).diff() > 0).all()


def test_mode_sampling_has_the_distribution_of_diffusers() -> None:
    from diffusers.training_utils import compute_density_for_timestep_sampling

    torch.manual_seed(0)
    theirs = 1 - compute_density_for_timestep_sampling("mode", 200_000, mode_scale=1.29)  # counts from noise
    ours = mode_sigmas(QUANTILES, 1.29)
    torch.testing.assert_close(theirs.double().quantile(QUANTILES).float(), ours, rtol=0, atol=0.006)


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_weights_of_levels_are_those_of_diffusers(name: str) -> None:
    from diffusers.training_utils import compute_loss_weighting_for_sd3

    sigmas = torch.tensor([0.001, 0.25, 0.5, 1.0])
    torch.testing.assert_close(level_weights(sigmas, name), compute_loss_weighting_for_sd3(name, sigmas))
    by_hand = {"sigma_sqrt": [16.0, 4.0, 1.0], "cosmap": [1.018592, 1.273240, 0.636620]}
    assert level_weights(sigmas, name)[1:].tolist() == pytest.approx(by_hand[name], abs=1e-5)
    assert level_weights(torch.zeros(1), "sigma_sqrt").item() == pytest.approx(1e6, rel=1e-5)


def test_chosen_levels_come_equally_often() -> None:
    sigmas = chosen_sigmas(torch.tensor([0.0, 0.33, 0.34, 0.67, 0.999], dtype=torch.float64), [0.9, 0.1, 0.5])
    assert sigmas.tolist() == pytest.approx([0.1, 0.1, 0.5, 0.9, 0.9])


def test_a_wider_logit_normal_reaches_further_out() -> None:
    q = torch.tensor([0.158655254], dtype=torch.float64)  # one deviation down
    assert logit_normal_sigmas(q, std=2.0).item() == pytest.approx(1 / (1 + math.exp(2)), abs=1e-6)


@pytest.mark.parametrize("multiplier", [0.0, 0.5, 3.0])
def test_biased_levels_come_so_many_times_as_often(multiplier: float) -> None:
    draws = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for sigmas_at in (uniform_sigmas, logit_normal_sigmas):
        plain = sigmas_at(draws)
        share = ((plain >= 0.75) & (plain <= 1)).double().mean().item()
        biased = sigmas_at(biased_quantiles(draws, sigmas_at, 0.75, 1.0, multiplier))
        found = ((biased >= 0.75) & (biased <= 1)).double().mean().item()
        assert found == pytest.approx(multiplier * share / (1 + (multiplier - 1) * share), abs=2e-3)
        # What lies outside keeps its proportions.
        low, lower = ((biased < 0.25).double().mean() / (1 - found)), ((plain < 0.25).double().mean() / (1 - share))
        assert low.item() == pytest.approx(lower.item(), abs=2e-3)


def test_a_bias_of_one_changes_nothing() -> None:
    torch.testing.assert_close(biased_quantiles(QUANTILES, uniform_sigmas, 0.2, 0.4, 1.0), QUANTILES)


def test_quantiles_of_the_logit_normal_are_its_inverse() -> None:
    torch.testing.assert_close(
        logit_normal_quantiles(logit_normal_sigmas(QUANTILES).double()), QUANTILES, atol=1e-6, rtol=0
    )


def test_the_levels_of_the_eval_loss_are_the_middles_of_equal_parts() -> None:
    assert fixed_quantiles(4).tolist() == [0.125, 0.375, 0.625, 0.875]


@pytest.mark.parametrize("level", [0.001, 0.003, 0.5, 0.997, 0.999])
def test_levels_of_other_distributions_survive_the_way_through_the_normal(level: float) -> None:
    """A family moves uniform levels as it moves its own: those far out must not all become one."""
    quantiles = logit_normal_quantiles(torch.tensor([level]))
    assert float(logit_normal_sigmas(quantiles)) == pytest.approx(level, rel=1e-3)


def test_the_shift_of_a_scheduler_is_the_one_that_its_file_names() -> None:
    assert [scheduler_shift(config, 999) for config in ({}, {"shift": 3}, {"flow_shift": 2})] == [1, 3, 2]
    assert scheduler_shift({"shift": 3, "flow_shift": 2, "use_dynamic_shifting": False}, 999) == 3
    # mu from 0 at 100 patches to 2 at 300: 1 in the middle; 3 at 400, since nothing ends the line.
    own = {"base_image_seq_len": 100, "max_image_seq_len": 300, "base_shift": 0.0, "max_shift": 2.0}
    dynamic = own | {"use_dynamic_shifting": True, "shift": 7.0}
    assert [scheduler_shift(dynamic, n) for n in (100, 200, 400)] == pytest.approx([1, math.e, math.exp(3)])


def test_levels_at_the_bounds_of_a_bias_are_inside() -> None:
    """Of three equally likely levels the middle one comes twice as often: 1, 2, 1 of four."""
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000

    def three(quantiles):
        return chosen_sigmas(quantiles, [0.25, 0.5, 0.75])

    biased = three(biased_quantiles(draws, three, 0.5, 0.5, 2.0))
    assert [(biased == level).double().mean().item() for level in (0.25, 0.5, 0.75)] == pytest.approx(
        [0.25, 0.5, 0.25], abs=2e-3
    )


def test_quantiles_outside_of_the_unit_interval_take_the_last_chosen_level() -> None:
    assert chosen_sigmas(torch.tensor([1.0]), [0.2, 0.8]).tolist() == pytest.approx([0.8])


def test_the_ends_of_the_unit_interval_are_no_infinite_logits() -> None:
    """The quantile of 1 - 2^-52 under the normal distribution is 8.1: sigmoid(8.1) is 0.9997."""
    low, high = logit_normal_sigmas(torch.tensor([0.0, 1.0])).tolist()
    assert (low, high) == (pytest.approx(3e-4, rel=0.05), pytest.approx(1 - 3e-4, rel=1e-4))


def test_a_line_through_points_is_followed_in_each_part_and_beyond_the_ends() -> None:
    xs, ys = torch.tensor([0.0, 1.0, 2.0, 4.0]), torch.tensor([0.0, 10.0, 8.0, 0.0])
    found = interpolate(torch.tensor([-0.5, 0.0, 0.25, 1.0, 1.5, 2.5, 4.0, 5.0]), xs, ys)
    assert found.tolist() == pytest.approx([-5.0, 0.0, 2.5, 10.0, 9.0, 6.0, 0.0, -4.0])
