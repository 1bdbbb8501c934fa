"""Errors and weights by hand, and against their limits."""

from __future__ import annotations

import pytest
import torch

from simpletuner.diffusion.loss import (
    huber_error,
    huber_limits,
    min_snr_weights,
    smooth_l1_error,
    squared_error,
)
from simpletuner.diffusion.reflexflow import compensation_weights, direction_loss, low_frequencies

ZERO = torch.zeros(1, 1, 1, 2)


def test_huber_and_smooth_l1_by_hand() -> None:
    """Differences 3 and 0, c = 4: sqrt(9 + 16) - 4 = 1; huber 2 * 4 * 1 = 8, smooth l1 2 * 1 = 2."""
    prediction, c = torch.tensor([[[[3.0, 0.0]]]]), torch.tensor([4.0])
    assert huber_error(prediction, ZERO, c).flatten().tolist() == [8, 0]
    assert smooth_l1_error(prediction, ZERO, c).flatten().tolist() == [2, 0]


def test_huber_is_the_squared_error_for_a_large_turning_point() -> None:
    prediction, target = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    found = huber_error(prediction.double(), target.double(), torch.full((3,), 1000.0, dtype=torch.float64))
    torch.testing.assert_close(found.float(), squared_error(prediction, target), rtol=1e-3, atol=1e-2)


def test_smooth_l1_is_twice_the_distance_for_a_small_one() -> None:
    prediction = torch.tensor([[[[3.0, -5.0]]]])
    assert smooth_l1_error(prediction, ZERO, torch.tensor([1e-4])).flatten().tolist() == pytest.approx(
        [6, 10], abs=1e-3
    )


def test_each_sample_has_its_own_turning_point() -> None:
    prediction = torch.full((2, 1, 1, 1), 3.0)
    found = huber_error(prediction, torch.zeros_like(prediction), torch.tensor([4.0, 1e-3]))
    assert found.flatten().tolist() == pytest.approx([8, 0.006], abs=1e-5)


def test_turning_points_follow_the_noise() -> None:
    sigmas = torch.tensor([0.0, 0.5, 1.0])
    noise_to_signal = torch.tensor([0.0, 1.0, torch.inf])
    assert huber_limits("constant", 0.1, sigmas, noise_to_signal).tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert huber_limits("exponential", 0.01, sigmas, noise_to_signal).tolist() == pytest.approx([1, 0.1, 0.01])
    # (1 - 0.1) / (1 + 1)^2 + 0.1 = 0.325
    assert huber_limits("snr", 0.1, sigmas, noise_to_signal).tolist() == pytest.approx([1, 0.325, 0.1])


def test_min_snr_weights_by_hand() -> None:
    snr = torch.tensor([0.0, 1.0, 5.0, 20.0, torch.inf])
    assert min_snr_weights(snr, 5.0, "epsilon").tolist() == pytest.approx([1, 1, 1, 0.25, 0])
    assert min_snr_weights(snr, 5.0, "v_prediction").tolist() == pytest.approx([0, 0.5, 5 / 6, 5 / 21, 0])
    # Sigma 1, 1/2, 1/4 and 0: the squared error of the data is sigma^2 that of the velocity.
    snr = torch.tensor([0.0, 1.0, 9.0, torch.inf])
    assert min_snr_weights(snr, 5.0, "flow").tolist() == pytest.approx([0, 1 / 4, 5 / 16, 0])


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "flow"])
def test_min_snr_weighs_the_error_of_the_data_whatever_is_predicted(predicts) -> None:
    """A prediction that is off by one says data that is off by some amount; its square counts min(snr, gamma)."""
    sigma, gamma = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), 5.0
    signal, noise = (1 - sigma, sigma) if predicts == "flow" else ((1 - sigma).sqrt(), sigma.sqrt())
    off_by = {"epsilon": noise / signal, "v_prediction": noise, "flow": noise}[predicts]
    snr = (signal / noise).square()
    weights = min_snr_weights(snr, gamma, predicts)
    torch.testing.assert_close(weights, snr.clamp_max(gamma) * off_by.square())


def test_directions_count_and_lengths_do_not() -> None:
    target = torch.tensor([[[[1.0, 0.0]]]]).expand(4, 1, 1, 2)
    prediction = torch.tensor([[5.0, 0.0], [-2.0, 0.0], [0.0, 3.0], [1.0, 1.0]]).reshape(4, 1, 1, 2)
    assert direction_loss(prediction, target).tolist() == pytest.approx([0, 4, 2, 2 - 2**0.5])


def test_low_frequencies_keep_waves_that_are_long_enough() -> None:
    places = torch.arange(16.0)
    long, short = (torch.cos(2 * torch.pi * k * places / 16).expand(1, 1, 16, 16) for k in (2, 7))
    torch.testing.assert_close(low_frequencies(long + short + 3), long + 3, rtol=0, atol=1e-5)


def test_drift_weighs_where_it_is_and_on_average_one_more() -> None:
    drift = torch.zeros(2, 1, 8, 8)
    drift[0, :, :, :4] = 1  # the left half has drifted; the second sample has not
    weights = compensation_weights(drift, 1.0)
    assert weights[0].mean().item() == pytest.approx(2)
    assert weights[0, 0, :, :4].mean() > 1.5 * weights[0, 0, :, 4:].mean()
    assert torch.equal(weights[1], torch.ones(1, 8, 8))
    torch.testing.assert_close(compensation_weights(drift, 0.0), torch.ones(2, 1, 8, 8))
