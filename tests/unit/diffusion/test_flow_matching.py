"""Hand-computed numbers of the one flow convention: sigma 0 is data, sigma 1 is noise."""

from __future__ import annotations

import torch

from simpletuner.diffusion.flow_matching import data_from_velocity, make_noisy_latents, velocity_target
from simpletuner.diffusion.loss import sample_means, sample_weights
from simpletuner.diffusion.timesteps import fixed_quantiles, logit_normal_sigmas
from simpletuner.training.losses.l2 import squared_error

LATENTS = torch.tensor([[[[1.0, -2.0]]], [[[0.5, 4.0]]]])
NOISE = torch.tensor([[[[0.0, 1.0]]], [[[-1.5, 2.0]]]])
SIGMAS = torch.tensor([0.25, 0.5])


def test_noisy_latents_are_the_hand_computed_mixture():
    noisy = make_noisy_latents(LATENTS, NOISE, SIGMAS)
    assert noisy.flatten().tolist() == [0.75, -1.25, -0.5, 3.0]


def test_sigma_zero_is_data_and_sigma_one_is_noise():
    assert torch.equal(make_noisy_latents(LATENTS, NOISE, torch.zeros(2)), LATENTS)
    assert torch.equal(make_noisy_latents(LATENTS, NOISE, torch.ones(2)), NOISE)


def test_target_is_noise_minus_latents():
    assert velocity_target(LATENTS, NOISE).flatten().tolist() == [-1.0, 3.0, -2.0, -2.0]


def test_the_true_velocity_leads_from_any_sigma_back_to_the_data():
    noisy = make_noisy_latents(LATENTS, NOISE, SIGMAS)
    torch.testing.assert_close(data_from_velocity(noisy, velocity_target(LATENTS, NOISE), SIGMAS), LATENTS)


def test_the_loss_of_a_zero_prediction_is_the_mean_square_of_the_target():
    target = velocity_target(LATENTS, NOISE)
    losses = sample_means(squared_error(torch.zeros_like(target), target))
    assert losses.tolist() == [5.0, 4.0]


def test_a_masked_loss_is_the_mean_over_the_mask_and_not_over_the_image():
    errors = torch.tensor([[[[2.0, 6.0]], [[4.0, 8.0]]]])  # (1, 2, 1, 2)
    mask = torch.tensor([[[[1.0, 0.0]]]])
    assert sample_means(errors, mask).tolist() == [3.0]
    assert sample_means(errors, 0.5 * torch.ones(1, 1, 1, 2)).tolist() == [5.0]
    assert sample_means(errors, mask / 16).tolist() == [3.0]  # however faint it is


def test_a_sample_with_an_empty_mask_counts_nothing():
    masks = torch.stack([torch.zeros(1, 2, 2), torch.ones(1, 2, 2)])
    assert sample_weights(torch.tensor([1.0, 2.0]), masks).tolist() == [0.0, 2.0]
    assert sample_means(torch.ones(2, 4, 2, 2), masks).tolist() == [0.0, 1.0]


def test_bfloat16_predictions_are_compared_in_float32():
    assert squared_error(torch.zeros(3, dtype=torch.bfloat16), torch.ones(3)).dtype == torch.float32


def test_logit_normal_quantiles_are_those_of_the_sigmoid_of_a_normal():
    sigmas = logit_normal_sigmas(torch.tensor([0.5, 0.8413447460685429, 0.15865525393145707]))
    expected = [0.5, 0.7310585786, 0.2689414214]  # sigmoid(0), sigmoid(1), sigmoid(-1)
    torch.testing.assert_close(sigmas, torch.tensor(expected), atol=1e-5, rtol=0)


def test_a_quantile_of_zero_gives_a_finite_sigma():
    assert 0 < float(logit_normal_sigmas(torch.zeros(1))[0]) < 0.01


def test_fixed_quantiles_are_midpoints():
    assert fixed_quantiles(4).tolist() == [0.125, 0.375, 0.625, 0.875]
