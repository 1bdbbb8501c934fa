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
    logit_normal_quantiles,
    logit_normal_sigmas,
    shift_of_size,
    shifted_sigmas,
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
