"""Each loss by hand, and against its limits; and that the table of the losses says what their classes are."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass

import pytest
import torch

from simpletuner.batch import Batch
from simpletuner.config.losses import LOSSES, LossRow
from simpletuner.config.options import all_options
from simpletuner.training.losses import base
from simpletuner.training.losses.base import Loss, build_loss
from simpletuner.training.losses.huber import Huber, turning_points
from simpletuner.training.losses.l2 import L2, squared_error
from simpletuner.training.losses.min_snr import min_snr_weights
from simpletuner.training.losses.reflexflow import compensation_weights, direction_loss, low_frequencies
from simpletuner.training.losses.smooth_l1 import SmoothL1
from simpletuner.training.objective import Objective
from simpletuner.training.step import compute_losses
from tests.toy import ToyFamily, load_toy

ZERO = torch.zeros(1, 1, 1, 2)


class Turning(Huber):
    """The Huber error with turning points that are given."""

    def __init__(self, limits: torch.Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "given", limits)

    def limits(self, family, sigmas):
        return self.given


class TurningSmooth(Turning, SmoothL1):
    """The smooth L1 error with turning points that are given."""

    errors = SmoothL1.errors


def huber_error(prediction: torch.Tensor, target: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    return Turning(limits).errors(ToyFamily(), prediction, target, torch.zeros(len(limits)))


def smooth_l1_error(prediction: torch.Tensor, target: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    return TurningSmooth(limits).errors(ToyFamily(), prediction, target, torch.zeros(len(limits)))


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
    assert turning_points("constant", 0.1, sigmas, noise_to_signal).tolist() == pytest.approx([0.1, 0.1, 0.1])
    assert turning_points("exponential", 0.01, sigmas, noise_to_signal).tolist() == pytest.approx([1, 0.1, 0.01])
    # (1 - 0.1) / (1 + 1)^2 + 0.1 = 0.325
    assert turning_points("snr", 0.1, sigmas, noise_to_signal).tolist() == pytest.approx([1, 0.325, 0.1])


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
    torch.testing.assert_close(low_frequencies((long + short + 3).mT), long.mT + 3, rtol=0, atol=1e-5)


def test_drift_weighs_where_it_is_and_on_average_one_more() -> None:
    drift = torch.zeros(2, 1, 8, 8)
    drift[0, :, :, :4] = 1  # the left half has drifted; the second sample has not
    weights = compensation_weights(drift, 1.0)
    assert weights[0].mean().item() == pytest.approx(2)
    assert weights[0, 0, :, :4].mean() > 1.5 * weights[0, 0, :, 4:].mean()
    assert torch.equal(weights[1], torch.ones(1, 8, 8))
    torch.testing.assert_close(compensation_weights(drift, 0.0), torch.ones(2, 1, 8, 8))


# ---- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_the_fields_of_a_loss_are_the_options_that_its_row_names(name: str) -> None:
    row = LOSSES[name]
    module, _, class_name = row.target.partition(":")
    kind = getattr(importlib.import_module(module), class_name)
    assert issubclass(kind, Loss)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    assert defaults == {option: all_options()[option].default for option in row.options}


def test_the_option_offers_every_loss_and_explains_it() -> None:
    option = all_options()["loss_type"]
    assert option.choices == tuple(LOSSES)
    assert [name for name in LOSSES if f"`{name}`" not in option.help] == []


def test_a_loss_is_built_with_the_values_that_are_written(tmp_path) -> None:
    written = {"loss_type": "smooth_l1", "huber_c": 0.25, "huber_schedule": "exponential"}
    assert build_loss(load_toy(tmp_path, **written).config.objective) == SmoothL1("exponential", 0.25)
    assert build_loss(load_toy(tmp_path).config.objective) == L2()


@dataclass(frozen=True)
class Halves(Loss):
    """Half of the distance: what somebody adds in one file and one row."""

    snr_gamma: float | None = None  # stands for an option of its own

    def errors(self, family, model_pred, target, sigmas):
        return 0.5 * (model_pred - target).abs()


def test_a_new_loss_is_a_class_and_a_row(tmp_path, monkeypatch) -> None:
    """The prediction of the toy is 0, the target its latents (4, 2): halves of the distances 2 and 1, a mean of 1.5."""
    rows = {**LOSSES, "l2": LossRow("is halved", f"{__name__}:Halves", ("snr_gamma",))}
    monkeypatch.setattr(base, "LOSSES", rows)
    loss = build_loss(load_toy(tmp_path, snr_gamma=3.0).config.objective)
    assert loss == Halves(3.0)
    latents = torch.tensor([4.0, 2.0]).reshape(1, 2, 1, 1)
    batch = Batch(latents, [], [0], ["a"], torch.ones(1), "d")
    quantiles = torch.tensor([0.5], dtype=torch.float64)
    losses = compute_losses(
        ToyFamily(), torch.zeros_like, batch, torch.zeros_like(latents), quantiles, Objective(loss=loss)
    )
    assert losses.per_sample.tolist() == [1.5]
