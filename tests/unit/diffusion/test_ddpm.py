"""Discrete schedules, against diffusers' own and numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler

from simpletuner.diffusion.ddpm import NoiseSchedule

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
TWO_LEVELS = NoiseSchedule(torch.tensor([0.64, 0.36], dtype=torch.float64))


@pytest.mark.parametrize("changes", [{}, {"rescale_betas_zero_snr": True}, {"beta_schedule": "linear"}], ids=str)
def test_a_schedule_is_that_of_diffusers(changes):
    config = SDXL | changes
    theirs, ours = DDPMScheduler(**config), NoiseSchedule.from_config(config)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=0, atol=2e-5)
    levels = torch.tensor([0, 1, 500, 999])
    sigmas = (levels + 1) / 1000
    latents, noise = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3)
    noisy = theirs.add_noise(latents, noise, levels)
    torch.testing.assert_close(ours.make_noisy(latents, noise, sigmas), noisy, rtol=0, atol=2e-3)
    velocity = theirs.get_velocity(latents, noise, levels)
    torch.testing.assert_close(ours.v_target(latents, noise, sigmas), velocity, rtol=0, atol=2e-3)
    assert ours.timesteps(sigmas).tolist() == levels.tolist()


def test_numbers_by_hand():
    sigmas = torch.tensor([0.0, 0.5, 1.0])
    signal, amount = TWO_LEVELS.signal_and_noise(sigmas)
    torch.testing.assert_close(signal, torch.tensor([1.0, 0.8, 0.6]))
    torch.testing.assert_close(amount, torch.tensor([0.0, 0.6, 0.8]))
    latents, noise = torch.full((3, 1), 10.0), torch.full((3, 1), 1.0)
    assert TWO_LEVELS.make_noisy(latents, noise, sigmas).flatten().tolist() == pytest.approx([10, 8.6, 6.8])
    assert TWO_LEVELS.v_target(latents, noise, sigmas).flatten().tolist() == pytest.approx([1, -5.2, -7.4])
    assert TWO_LEVELS.snr(sigmas)[1:].tolist() == pytest.approx([0.64 / 0.36, 0.36 / 0.64])
    assert TWO_LEVELS.timesteps(sigmas).tolist() == [0, 0, 1]


def test_every_level_is_equally_likely_and_its_sigma_names_it():
    schedule = NoiseSchedule.from_config(SDXL)
    quantiles = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    levels = schedule.timesteps(schedule.sigmas_at(quantiles))
    assert levels.bincount().tolist() == [10] * 1000
    assert schedule.sigmas_at(torch.tensor([0.0, 1 - 1e-12], dtype=torch.float64)).tolist() == pytest.approx([0.001, 1])


def test_without_a_signal_at_the_end_the_last_level_is_noise_alone():
    schedule = NoiseSchedule.from_config(SDXL | {"rescale_betas_zero_snr": True})
    signal, amount = schedule.signal_and_noise(torch.tensor([0.001, 1.0]))
    assert signal[1] == 0
    assert amount[1] == 1
    assert signal[0].item() == pytest.approx((1 - 0.00085) ** 0.5)


def test_an_unknown_beta_schedule_is_refused():
    with pytest.raises(ValueError, match="squaredcos"):
        NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})


def test_the_data_that_a_prediction_amounts_to_by_hand() -> None:
    """abar 0.64: 0.8 of data 3 and 0.6 of noise -1 are 1.8; v is 0.8 * -1 - 0.6 * 3."""
    schedule = NoiseSchedule(torch.tensor([0.64], dtype=torch.float64))
    latents, noise, sigmas = torch.tensor([[3.0]]), torch.tensor([[-1.0]]), torch.tensor([1.0])
    noisy = schedule.make_noisy(latents, noise, sigmas)
    assert noisy.item() == pytest.approx(1.8)
    velocity = schedule.v_target(latents, noise, sigmas)
    assert velocity.item() == pytest.approx(-2.6)
    assert schedule.estimate_data(noisy, velocity, sigmas, is_velocity=True).item() == pytest.approx(3)
    assert schedule.estimate_data(noisy, noise, sigmas, is_velocity=False).item() == pytest.approx(3)


@pytest.mark.parametrize("config", [{}, {"trained_betas": [0.1, 0.5, 0.2]}, {"num_train_timesteps": 10}], ids=str)
def test_what_a_file_leaves_out_is_as_diffusers_has_it(config):
    ours, theirs = NoiseSchedule.from_config(config), DDPMScheduler(**config)
    assert ours.num_levels == len(theirs.alphas_cumprod)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-6)


def test_levels_between_two_go_to_the_nearest():
    """Of two levels, sigma 0.7 is nearer to the first (0.5) and 0.8 to the second (1)."""
    assert TWO_LEVELS.timesteps(torch.tensor([0.2, 0.7, 0.8])).tolist() == [0, 0, 1]
    signal, _ = TWO_LEVELS.signal_and_noise(torch.tensor([0.2, 0.7, 0.8]))
    torch.testing.assert_close(signal, torch.tensor([1.0, 0.8, 0.6]))


def test_of_noise_alone_the_estimate_stays_finite():
    schedule = NoiseSchedule(torch.tensor([0.0], dtype=torch.float64))
    one = torch.ones(1, 1)
    assert schedule.estimate_data(one * 3, one, torch.ones(1), is_velocity=False).item() == pytest.approx(2e4)
    assert schedule.estimate_data(one * 3, one, torch.ones(1), is_velocity=True).item() == -1
