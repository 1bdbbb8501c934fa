"""Rollouts: when, how deep, in the right direction of time, and with a target that leads to the data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from simpletuner.batch import Batch, Conditioning, PromptEmbeds
from simpletuner.diffusion.ddpm import NoiseSchedule
from simpletuner.families.spec import FamilySpec
from simpletuner.models.family import ModelFamily
from simpletuner.randomness import keyed_seed
from simpletuner.reporting.events import StepDone
from simpletuner.training import rollout
from simpletuner.training.loop import forward_micro_batch, run_training
from simpletuner.training.losses.reflexflow import ReflexFlow
from simpletuner.training.rollout import Rollouts, build_rollouts, implied_noise, roll_out, train_from_rollout
from simpletuner.training.step import compute_losses
from tests.runs import dataset, metrics, train_here, write_images, write_run
from tests.toy import ToyDataset, load_toy, toy_run
from tests.unit.config.conftest import FAMILY


class Exact(ModelFamily):
    """A flow family whose denoiser says the velocity outright."""

    def __init__(self, spec: FamilySpec = FAMILY):
        super().__init__(spec, None, torch.device("cpu"), torch.float32)  # type: ignore[arg-type]
        self.seen: list[list[float]] = []

    def encode_prompts(self, prompts, references=None):
        return [PromptEmbeds({"x": torch.zeros(1)})] * len(prompts)

    def collate(self, batch: Batch) -> Conditioning:
        return Conditioning({})

    def pipeline(self, denoiser, vae=None):
        raise AssertionError

    def predict(self, denoiser, noisy_latents, sigmas, conditioning):
        self.seen.append([round(sigma, 4) for sigma in sigmas.tolist()])
        return denoiser(noisy_latents, sigmas)


class Epsilon(Exact):
    """The same for a family that predicts noise at discrete levels."""

    schedule = NoiseSchedule(torch.linspace(0.999, 0.001, 100, dtype=torch.float64))

    def make_noisy(self, latents, noise, sigmas):
        return self.schedule.make_noisy(latents, noise, sigmas)

    def make_target(self, latents, noise, sigmas):
        return noise

    def signal_and_noise(self, sigmas):
        return self.schedule.signal_and_noise(sigmas)

    def estimate_data(self, noisy_latents, model_pred, sigmas):
        return self.schedule.estimate_data(noisy_latents, model_pred, sigmas, is_velocity=False)


DATA, NOISE = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
SIGMAS = torch.tensor([0.3, 0.8])


def batch() -> Batch:
    return Batch(DATA, [PromptEmbeds({})] * 2, [0, 1], ["a", "b"], torch.ones(2), "d")


@pytest.mark.parametrize("solver", ["euler", "dpm", "unipc"])
@pytest.mark.parametrize("family", [Exact(), Epsilon()])
def test_a_perfect_model_leads_back_to_the_very_latents_of_training(family, solver: str) -> None:
    answer = (lambda x, s: NOISE) if isinstance(family, Epsilon) else (lambda x, s: NOISE - DATA)
    rolled = roll_out(
        family, answer, Conditioning({}), DATA, NOISE, SIGMAS, 3, Rollouts(solver=solver, step_length=0.05)
    )
    torch.testing.assert_close(rolled, family.make_noisy(DATA, NOISE, SIGMAS), rtol=0, atol=2e-4)
    torch.testing.assert_close(implied_noise(family, rolled, DATA, SIGMAS), NOISE, rtol=0, atol=2e-3)


def test_steps_go_from_more_noise_to_less_and_begin_at_pure_noise_at_most() -> None:
    family = Exact()
    roll_out(family, lambda x, s: NOISE - DATA, Conditioning({}), DATA, NOISE, SIGMAS, 3, Rollouts(step_length=0.1))
    assert family.seen == [[0.6, 1.0], [0.5, 0.9333], [0.4, 0.8667]]


def test_the_target_of_a_drifted_latent_ends_on_the_data() -> None:
    """A model that predicts too little: the corrected velocity takes what it made of the latents to the data."""
    family = Exact()
    rolled = roll_out(
        family, lambda x, s: 0.5 * (NOISE - DATA), Conditioning({}), DATA, NOISE, SIGMAS, 2, Rollouts(step_length=0.1)
    )
    assert (rolled - family.make_noisy(DATA, NOISE, SIGMAS)).abs().max() > 0.01
    target = family.make_target(DATA, implied_noise(family, rolled, DATA, SIGMAS), SIGMAS)
    torch.testing.assert_close(family.estimate_data(rolled, target, SIGMAS), DATA, rtol=0, atol=1e-4)


@pytest.mark.parametrize("reflex", [None, ReflexFlow()])
def test_the_loss_is_zero_for_whoever_knows_the_way_back_and_no_gradient_goes_through_the_rollout(reflex) -> None:
    family, scale = Exact(), torch.nn.Parameter(torch.tensor(0.5))
    calls: list[bool] = []

    def denoiser(x, sigmas):
        calls.append(torch.is_grad_enabled())
        if torch.is_grad_enabled():  # the training call: the way from here to the data
            return (x - DATA) / sigmas[:, None, None, None] * (scale / 0.5)
        return scale * (NOISE - DATA)

    quantiles = torch.tensor([0.4, 0.6], dtype=torch.float64)
    rollouts = Rollouts(max_depth=4, reflex=reflex)
    roll = partial(train_from_rollout, family=family, denoiser=denoiser, depth=3, rollouts=rollouts)
    losses = compute_losses(family, denoiser, batch(), NOISE, quantiles, changes=[roll])
    assert calls == [False, False, False, True]
    assert losses.per_sample.max().item() == pytest.approx(0, abs=1e-5)
    losses.weighted_sum.backward()
    assert scale.grad is not None


def test_the_drift_is_the_way_from_the_latents_of_training_to_those_that_were_rolled_out() -> None:
    seen: list[torch.Tensor] = []

    class Watched(ReflexFlow):
        def losses(self, errors, model_pred, target, masks, *, drift):
            seen.append(drift)
            return super().losses(errors, model_pred, target, masks, drift=drift)

    def denoiser(x, sigmas):
        return 0.5 * (NOISE - DATA)

    family, rollouts = Exact(), Rollouts(max_depth=4, reflex=Watched())
    roll = partial(train_from_rollout, family=family, denoiser=denoiser, depth=2, rollouts=rollouts)
    compute_losses(family, denoiser, batch(), NOISE, torch.tensor([0.4, 0.6], dtype=torch.float64), changes=[roll])
    # Each of the two steps goes half as far as it should: the latents end short by half of the way that they went.
    (drift,) = seen
    direction = (NOISE - DATA).flatten(1)
    shares = drift.flatten(1) / direction
    assert torch.allclose(shares, shares[:, :1].expand_as(shares), atol=1e-3)
    assert shares[:, 0].tolist() == pytest.approx([0.5 * 2 * rollouts.step_length] * 2, abs=1e-3)


def test_regularisation_is_never_rolled_out_and_keeps_the_base_as_its_target(tmp_path: Path) -> None:
    """Two passes: the base's answer, which is the target, and the prediction. An image to train on has three more."""
    rolled = {
        "scheduled_sampling_max_step_offset": 3,
        "scheduled_sampling_probability": 1.0,
        "scheduled_sampling_reflexflow": False,
    }
    passes = {}
    for is_regularisation in (True, False):
        data = ToyDataset({"a": (4.0, 2.0)}, is_regularisation=is_regularisation)
        folder = tmp_path / str(is_regularisation)
        folder.mkdir()
        run, _ = toy_run(folder, [data], **rolled)
        depth = run.rollouts.depth(run.seed, 0, 0)
        losses = forward_micro_batch(run, run.batches.build_window(0, 0, 0), 0)
        passes[is_regularisation] = len(run.model.family.sigmas)
        # The toy and its base both answer 0; the target of an image to train on is (4, 2).
        assert losses.per_sample.tolist() == pytest.approx([0.0 if is_regularisation else 10.0])
    assert passes == {True: 2, False: 1 + depth}


def test_reflexflow_by_hand() -> None:
    """No drift: the error counts once, and a prediction at right angles to the target costs 10 * 2 more."""
    target, prediction = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    target[0, 0, 0, 0], prediction[0, 0, 0, 1] = 2.0, 4.0
    errors = (prediction - target).square()  # 4 and 16: a mean of 5
    drift = torch.zeros(1, 1, 2, 2)
    assert ReflexFlow().losses(errors, prediction, target, None, drift=drift).tolist() == [25.0]
    # A mask that leaves the left column: the error is 4 / 2, and the masked prediction is zero, without a direction.
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    assert ReflexFlow(direction=1).losses(errors, prediction, target, mask, drift=drift).tolist() == [4.0]
    prediction[0, 0, 0, 0] = 1.0  # what the mask leaves has the target's direction: its error alone counts, 1 / 2
    errors = (prediction - target).square()
    assert ReflexFlow().losses(errors, prediction, target, mask, drift=drift).tolist() == pytest.approx([0.5], abs=1e-5)


def test_shares_follow_the_ramp() -> None:
    rollouts = Rollouts(max_depth=3, start_step=10, ramp_steps=10, ramp_from=0.2, ramp_to=0.6)
    found = [rollouts.probability_at(step) for step in (0, 9, 10, 15, 20, 99)]
    assert found == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.6])
    cosine = Rollouts(max_depth=3, ramp_steps=12, ramp_from=0.0, ramp_to=1.0, ramp_shape="cosine")
    assert [cosine.probability_at(step) for step in (0, 4, 6, 12)] == pytest.approx([0, 0.25, 0.5, 1])
    assert Rollouts(max_depth=3, probability=0.3, start_step=5).probability_at(4) == 0
    assert Rollouts(max_depth=3, probability=0.3, start_step=5).probability_at(5) == 0.3


@pytest.mark.parametrize(
    ("strategy", "shares"),
    [
        ("uniform", [1 / 3, 1 / 3, 1 / 3]),
        ("biased_early", [3 / 6, 2 / 6, 1 / 6]),
        ("biased_late", [1 / 6, 2 / 6, 3 / 6]),
    ],
)
def test_depths_are_drawn_as_the_strategy_says(strategy, shares: list[float]) -> None:
    rollouts = Rollouts(max_depth=3, probability=0.5, strategy=strategy)
    depths = Counter(rollouts.depth(1, step, micro) for step in range(2000) for micro in range(2))
    assert depths[0] / 4000 == pytest.approx(0.5, abs=0.03)
    found = [depths[depth] / (4000 - depths[0]) for depth in (1, 2, 3)]
    assert found == pytest.approx(shares, abs=0.04)
    assert Rollouts(probability=1.0).depth(1, 0, 0) == 0


@pytest.mark.parametrize("strategy", ["uniform", "biased_early", "biased_late"])
def test_the_expected_depth_is_the_mean_of_what_is_drawn(strategy: str) -> None:
    rollouts = Rollouts(max_depth=4, start_step=500, ramp_steps=1000, ramp_to=0.8, strategy=strategy)
    generated = [rollouts.depth(3, step, 0) for step in range(4000)]
    assert rollouts.expected_depth(4000) == pytest.approx(sum(generated) / len(generated), rel=0.1)
    assert Rollouts(probability=1.0).expected_depth(100) == 0


@pytest.mark.parametrize(
    ("solver", "reflexflow"),
    [
        ("unipc", True),
        ("euler", False),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("unipc", False), ("euler", True))),
    ],
)
def test_the_tiny_model_trains_on_its_own_steps_and_resumes_to_the_same_bits(
    tmp_path: Path, omnigen_folder: Path, solver: str, reflexflow: bool
) -> None:
    options = {
        "scheduled_sampling_max_step_offset": 3,
        "scheduled_sampling_probability": 0.7,
        "scheduled_sampling_sampler": solver,
        "scheduled_sampling_reflexflow": reflexflow,
    }
    losses = {}
    for name, steps in (("straight", (8,)), ("resumed", (4, 8))):
        write_images(tmp_path / name / "images", 5, seed=1)
        folder = write_run(tmp_path / name, omnigen_folder, [dataset("images")], **options)
        for count in steps:
            output = train_here(folder, f"--max_train_steps={count}")
        records = metrics(output, "step_done")
        losses[name] = [record["loss"] for record in records]
        depths = [record["extra"]["rollout_depth"] for record in records]
        assert 0 < sum(depths) < 24
    assert losses["straight"] == losses["resumed"]


def test_every_setting_of_a_rollout_is_read(tmp_path: Path) -> None:
    def built(folder: str, prediction_type: str = "flow", **options) -> Rollouts:
        options = {f"scheduled_sampling_{name}": value for name, value in options.items()}
        config = load_toy(tmp_path / folder, validation_num_inference_steps=40, **options).config
        return build_rollouts(config, dataclasses.replace(FAMILY, prediction_type=prediction_type))

    found = built(
        "set", max_step_offset=4, probability=0.3, start_step=5, ramp_steps=7, prob_start=0.1, prob_end=0.9,
        ramp_shape="cosine", strategy="biased_late", sampler="dpm", order=1, reflexflow_alpha=2.0,
        reflexflow_beta1=3.0, reflexflow_beta2=4.0,
    )  # fmt: skip
    expected = Rollouts(4, 1 / 40, 0.3, 5, 7, 0.1, 0.9, "cosine", "biased_late", "dpm", 1, ReflexFlow(2.0, 3.0, 4.0))
    assert found == expected
    some = {"max_step_offset": 4, "probability": 0.5}
    assert built("epsilon", "epsilon", **some).reflex is None
    assert built("off", reflexflow=False, **some).reflex is None
    assert built("asked", "epsilon", reflexflow=True, **some).reflex is not None
    assert built("plain").max_depth == 0


def test_a_depth_goes_with_step_and_micro_batch() -> None:
    rollouts = Rollouts(max_depth=3, probability=1.0)
    by_step = [rollouts.depth(1, step, 0) for step in range(200)]
    by_micro = [rollouts.depth(1, 0, micro) for micro in range(200)]
    by_seed = [rollouts.depth(seed, 0, 0) for seed in range(200)]
    for depths in (by_step, by_micro, by_seed):
        assert set(depths) == {1, 2, 3}
    key = (1, "rollout", 6, 2)
    assert rollouts.depth(1, 6, 2) == 1 + int(keyed_seed(*key, "depth") / 2**63 * 3)


def test_the_expected_depth_by_hand() -> None:
    """Depths 1, 2, 3 weigh 3, 2, 1: a mean of 10 / 6; steps 0 to 3 have shares 0, 0, 0.5, 0.5."""
    rollouts = Rollouts(max_depth=3, probability=0.5, start_step=2, strategy="biased_early")
    assert rollouts.expected_depth(4) == pytest.approx(10 / 6 * 0.25)


def test_noise_of_almost_clean_latents_is_not_blown_up() -> None:
    """The drift 0.5 is divided by 0.02 at least, not by the 0.001 of noise that there is."""
    family, sigmas = Exact(), torch.tensor([0.001])
    data = torch.zeros(1, 1, 1, 1)
    assert implied_noise(family, data + 0.5, data, sigmas).item() == pytest.approx(25)
    assert implied_noise(family, data + 0.5, data, torch.tensor([0.5])).item() == pytest.approx(1)


def test_a_ramp_that_begins_at_nothing_is_a_rollout_all_the_same(tmp_path: Path) -> None:
    options = {"max_step_offset": 2, "ramp_steps": 10, "prob_start": 0.0, "prob_end": 0.5}
    config = load_toy(tmp_path, **{f"scheduled_sampling_{name}": value for name, value in options.items()}).config
    assert build_rollouts(config, FAMILY).probability_at(5) == 0.25


def test_a_rollout_has_the_order_that_is_written(monkeypatch) -> None:
    made = []

    class Watched(rollout.Solver):
        def __init__(self, *given) -> None:
            made.append(given)
            super().__init__(*given)

    monkeypatch.setattr(rollout, "Solver", Watched)
    rollouts = Rollouts(solver="dpm", order=1, step_length=0.1)
    roll_out(Exact(), lambda x, s: NOISE - DATA, Conditioning({}), DATA, NOISE, SIGMAS, 2, rollouts)
    assert made == [("dpm", 1)]


def test_the_reported_depth_is_the_mean_of_the_micro_batches_of_the_step(tmp_path: Path) -> None:
    """A micro-batch takes one pass of the denoiser more than its depth."""
    options = {"scheduled_sampling_max_step_offset": 3, "scheduled_sampling_probability": 1.0}
    images = {"a": (4.0, 2.0), "b": (4.0, 2.0)}
    run, recorder = toy_run(tmp_path, images, gradient_accumulation_steps=2, max_train_steps=8, **options)
    passes = []
    noisy = run.model.family.noisy
    recorder.handle = lambda event: (recorder.events.append(event), passes.append(len(noisy)))
    run_training(run)
    reported = zip(recorder.events, passes, strict=True)
    steps = [(event, count) for event, count in reported if isinstance(event, StepDone)]
    counts = [count for _, count in steps]
    taken = [after - before for before, after in pairwise([0, *counts])]
    assert [event.extra["rollout_depth"] for event, _ in steps] == [(count - 2) / 2 for count in taken]
    assert len(set(taken)) > 1
