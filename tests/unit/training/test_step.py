"""The step: keyed draws, and losses that do not depend on how samples are grouped."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from simpletuner.batch import Batch
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.training.losses.perturbation import perturb
from simpletuner.training.losses.prior_preservation import aim_at_base
from simpletuner.training.objective import Objective
from simpletuner.training.step import compute_losses, sample_noise, sample_quantiles
from tests.toy import ToyFamily


@pytest.fixture(scope="module")
def family(omnigen_folder: Path) -> ModelFamily:
    spec = get_spec("omnigen")
    return get_family_class(spec)(spec, ModelSource(str(omnigen_folder)), torch.device("cpu"), torch.float32)


def batch_of(family: ModelFamily, slots: list[int], is_regularisation: bool = False) -> Batch:
    captions = ["a cat", "a green star on a white background", "a red circle", "b"]
    latents = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(slot)) for slot in slots]
    return Batch(
        latents=torch.stack(latents),
        prompt_embeds=family.encode_prompts([captions[slot] for slot in slots]),
        slots=slots,
        digests=[str(slot) for slot in slots],
        loss_weights=torch.ones(len(slots)),
        dataset_id="d",
        is_regularisation=is_regularisation,
    )


def losses_of(family: ModelFamily, denoiser: torch.nn.Module, batch: Batch):
    return compute_losses(family, denoiser, batch, sample_noise(batch, 1, 5), sample_quantiles(batch, 1, 5))


def test_noise_depends_on_the_slot_and_not_on_the_batch_it_is_drawn_in(family):
    whole = sample_noise(batch_of(family, [0, 1, 2, 3]), seed=1, step=5)
    second_half = sample_noise(batch_of(family, [2, 3]), seed=1, step=5)
    assert torch.equal(whole[2:], second_half)


@pytest.mark.parametrize("seed_and_step", [(1, 6), (2, 5)])
def test_noise_and_quantiles_differ_by_seed_and_by_step(family, seed_and_step):
    batch = batch_of(family, [0, 1])
    assert not torch.equal(sample_noise(batch, 1, 5), sample_noise(batch, *seed_and_step))
    assert not torch.equal(sample_quantiles(batch, 1, 5), sample_quantiles(batch, *seed_and_step))


def test_each_slot_of_a_global_batch_gets_another_part_of_the_levels(family):
    """Eight slots, taken two at a time as micro-batches and processes take them: one quantile in each eighth."""
    parts = [batch_of(family, [0, 1])] * 4
    for step in range(3):
        quantiles = [
            sample_quantiles(replace(part, slots=[2 * place, 2 * place + 1]), 1, step, num_strata=8)
            for place, part in enumerate(parts)
        ]
        assert sorted((torch.cat(quantiles) * 8).long().tolist()) == list(range(8))
    orders = [(sample_quantiles(replace(parts[0], slots=range(8)), 1, s, 8) * 8).long().tolist() for s in range(4)]
    assert len({tuple(order) for order in orders}) > 1


def test_one_stratum_is_a_plain_draw(family):
    batch = batch_of(family, [0, 1])
    assert torch.equal(sample_quantiles(batch, 1, 5, num_strata=1), sample_quantiles(batch, 1, 5))
    within = sample_quantiles(batch, 1, 5, num_strata=2) * 2 % 1
    torch.testing.assert_close(within, sample_quantiles(batch, 1, 5))


def test_two_micro_batches_give_the_losses_and_gradients_of_one_batch(family):
    denoiser = family.load_denoiser().requires_grad_(True)
    whole = losses_of(family, denoiser, batch_of(family, [0, 1, 2, 3]))
    (whole.weighted_sum / 4).backward()
    expected = {name: p.grad.clone() for name, p in denoiser.named_parameters() if p.grad is not None}
    denoiser.zero_grad()
    parts = []
    for slots in ([0, 1], [2, 3]):
        part = losses_of(family, denoiser, batch_of(family, slots))
        (part.weighted_sum / 4).backward()
        parts.append(part.per_sample)
    torch.testing.assert_close(torch.cat(parts), whole.per_sample)
    for name, parameter in denoiser.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-4)


def test_a_denoiser_that_knows_the_answer_has_no_loss(family):
    batch = batch_of(family, [0, 1])
    noise = sample_noise(batch, 1, 5)

    class Oracle(type(family)):
        def predict(self, denoiser, noisy_latents, sigmas, conditioning):
            return noise - batch.latents

    oracle = Oracle(family.spec, family.source, family.device, family.dtype)
    assert losses_of(oracle, torch.nn.Identity(), batch).per_sample.tolist() == [0.0, 0.0]


def test_the_target_of_a_regularisation_batch_is_the_prediction_without_the_adapter(family):
    from contextlib import contextmanager

    denoiser = family.load_denoiser()
    batch = batch_of(family, [0, 1], is_regularisation=True)
    noise, quantiles = sample_noise(batch, 1, 5), sample_quantiles(batch, 1, 5)
    aim = partial(aim_at_base, family=family, denoiser=denoiser)
    plain = partial(aim, without_adapter=torch.no_grad)
    same = compute_losses(family, denoiser, batch, noise, quantiles, changes=[plain])
    assert same.per_sample.tolist() == [0.0, 0.0]

    @contextmanager
    def without_adapter():
        with torch.no_grad():
            denoiser.proj_out.bias.sub_(1.0)  # what the "adapter" adds to each output
        yield
        with torch.no_grad():
            denoiser.proj_out.bias.add_(1.0)

    changed = compute_losses(
        family, denoiser, batch, noise, quantiles, changes=[partial(aim, without_adapter=without_adapter)]
    )
    torch.testing.assert_close(changed.per_sample, torch.ones(2), atol=1e-4, rtol=0)


class Zero(ToyFamily):
    """A flow family that always answers 0: its loss is the mean of the squared target."""

    make_target = ModelFamily.make_target

    def predict(self, denoiser, noisy_latents, sigmas, conditioning):
        self.noisy.append(noisy_latents)
        return torch.zeros_like(noisy_latents)


def test_weights_of_levels_and_noise_that_the_target_does_not_know_by_hand():
    """The target is noise - latents, (3, -1) - (1, 1); at sigma 0.5 the signal to noise ratio is 1."""
    family = Zero()
    latents, noise = (torch.tensor(values).reshape(1, 2, 1, 1) for values in ((1.0, 1.0), (3.0, -1.0)))
    batch = Batch(latents, [], [0], ["a"], torch.ones(1), "d")
    half = torch.tensor([0.5], dtype=torch.float64)
    plain = compute_losses(family, torch.nn.Identity(), batch, noise, half)
    assert plain.per_sample.tolist() == [4]
    assert plain.sigmas.tolist() == [0.5]
    more = partial(perturb, family=family, perturbed_noise=noise + 2)
    perturbed = compute_losses(family, torch.nn.Identity(), batch, noise, half, changes=[more])
    assert perturbed.per_sample.tolist() == [4]
    assert family.noisy[1].flatten().tolist() == [3, 1]  # half of (1, 1) and half of (5, 1)
    weighed = compute_losses(family, torch.nn.Identity(), batch, noise, half, objective=Objective(snr_gamma=0.5))
    assert weighed.per_sample.tolist() == [pytest.approx(4 * 0.5 / 4)]  # min(1, 0.5) / (1 + 1)^2


def test_a_change_of_the_target_and_of_the_mean_is_what_the_loss_is_made_of():
    """Prediction 0, target 3 in place of 1: the error is 9, and the mean is told of the prediction and the target."""
    family = ToyFamily()
    family.predict = lambda denoiser, noisy, *rest: torch.zeros_like(noisy)
    batch = Batch(
        latents=torch.ones(2, 2, 1, 1), prompt_embeds=[], slots=[0, 1], digests=["a", "b"],
        loss_weights=torch.ones(2), dataset_id="d",
    )  # fmt: skip

    def mean(errors, prediction, target, masks):
        assert masks is None
        return (errors + 100 * prediction + 10 * target).flatten(1).mean(dim=1)

    def change(example):
        return replace(example, target=3 * example.target, mean=mean)

    losses = compute_losses(family, None, batch, torch.zeros(2, 2, 1, 1), torch.tensor([0.5, 0.5]), changes=[change])
    assert losses.per_sample.tolist() == [39, 39]
