"""Every number of a step, a window and a run, worked out by hand (`tests/toy.py` has the arithmetic)."""

from __future__ import annotations

import json
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.errors import DivergedError, Interrupted
from simpletuner.randomness import keyed_seed
from simpletuner.reporting.events import CheckpointSaved, EvalDone, LossBySigma, Notice, StepDone
from simpletuner.training.checkpoint import Saved, load_checkpoint
from simpletuner.training.evaluation import EvalResult
from simpletuner.training.loop import run_training
from simpletuner.training.loss_scale import LossScale
from tests.processes import in_processes
from tests.toy import ToyDataset, toy_run, weights_of

# Its gradient at weights of zero is (-1, -3); each step at a rate of 0.5 goes half of the way.
ONE = {"a": (1.0, 3.0)}
MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


def steps_of(recorder) -> list[StepDone]:
    return recorder.of(StepDone)


def test_each_step_moves_by_its_reported_rate_times_the_gradient(tmp_path):
    """A warm-up of 2 steps to 0.5: rates 0, 0.25, 0.5, 0.5."""
    run, recorder = toy_run(tmp_path, ONE, lr_scheduler="constant_with_warmup", lr_warmup_steps=2, max_train_steps=4)
    seen = []
    run.session.bus._sinks[0].handle = lambda event: (recorder.events.append(event), seen.append(weights_of(run)))
    run_training(run)
    assert [step.learning_rate for step in steps_of(recorder)] == [0, 0.25, 0.5, 0.5]
    assert seen[:4] == [[0, 0], [0.25, 0.75], [0.625, 1.875], [0.8125, 2.4375]]
    # (1 + 9) / 2, twice; (0.75^2 + 2.25^2) / 2; (0.375^2 + 1.125^2) / 2
    assert [step.loss for step in steps_of(recorder)] == [5, 5, 2.8125, 0.703125]
    assert [step.step for step in steps_of(recorder)] == [1, 2, 3, 4]
    assert {step.total_steps for step in steps_of(recorder)} == {4}


def test_a_schedule_ends_where_it_should(tmp_path):
    """Linear from 0.5 to 0 in 4 steps."""
    run, recorder = toy_run(tmp_path, ONE, lr_scheduler="linear", lr_end=0.0, max_train_steps=4)
    run_training(run)
    assert [step.learning_rate for step in steps_of(recorder)] == [0.5, 0.375, 0.25, 0.125]
    # What is left of the way: 1/2, 5/8, 3/4, 7/8 of it.
    left = 0.5 * 0.625 * 0.75 * 0.875
    assert weights_of(run) == pytest.approx([1 - left, 3 * (1 - left)])


def test_the_learning_rate_grows_with_the_samples_of_a_step_where_asked(tmp_path):
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 1}
    images = {name: (1.0, 3.0) for name in "abcd"}
    run, recorder = toy_run(tmp_path, images, learning_rate=0.125, lr_scale=True, **options)
    run_training(run)
    assert steps_of(recorder)[0].learning_rate == 0.5
    assert weights_of(run) == [0.5, 1.5]


def test_a_window_has_the_gradient_of_its_real_samples_alone(tmp_path):
    """Four samples in two micro-batches, one of them with an empty mask: the mean of (1, 3), (3, 1) and (2, 2)."""
    images = {"a": (1.0, 3.0), "b": (3.0, 1.0), "c": (100.0, 100.0), "d": (2.0, 2.0)}
    data = [ToyDataset(images, mask_of={"a": 1.0, "b": 1.0, "c": 0.0, "d": 1.0})]
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 1}
    run, recorder = toy_run(tmp_path, data, **options)
    run_training(run)
    assert weights_of(run) == pytest.approx([1, 1])
    [step] = steps_of(recorder)
    assert step.loss == pytest.approx((5 + 5 + 4) / 3)
    assert step.samples == 4
    assert step.grad_norm == pytest.approx(8**0.5)


def test_micro_batches_train_what_one_batch_does_a_short_one_too(tmp_path):
    """Three samples: their mean is (2, 4), whether they come as 3, 2 + 1 or 1 + 1 + 1."""
    images = {"a": (1.0, 3.0), "b": (3.0, 1.0), "c": (2.0, 8.0)}
    for size, accumulation, slots in ((3, 1, [[0, 1, 2]]), (2, 2, [[0, 1], [2]]), (1, 3, [[0], [1], [2]])):
        options = {"train_batch_size": size, "gradient_accumulation_steps": accumulation, "max_train_steps": 1}
        run, recorder = toy_run(tmp_path / str(size), images, **options)
        run_training(run)
        assert weights_of(run) == pytest.approx([1, 2])
        assert steps_of(recorder)[0].loss == pytest.approx((5 + 5 + 34) / 3)
        assert [list(batch.slots) for batch in run.model.family.batches] == slots


def test_the_noise_and_the_level_of_a_sample_are_those_of_its_step_and_slot(tmp_path):
    """Images of zeros: what the model sees is sigma times the noise, drawn here again from its key."""
    images = {name: (0.0, 0.0) for name in "abcd"}
    run, _ = toy_run(tmp_path, images, train_batch_size=2, gradient_accumulation_steps=2, max_train_steps=2)
    run_training(run)
    for call, (step, slots) in enumerate([(0, (0, 1)), (0, (2, 3)), (1, (0, 1)), (1, (2, 3))]):
        for row, slot in enumerate(slots):
            noise = torch.randn(2, 1, 1, generator=torch.Generator().manual_seed(keyed_seed(3, "noise", step, slot)))
            quantile = keyed_seed(3, "timestep", step, slot) / 2**63
            sigma = torch.sigmoid(torch.special.ndtri(torch.tensor(quantile, dtype=torch.float64)))
            torch.testing.assert_close(run.model.family.noisy[call][row], noise * sigma.float())


def test_the_saved_average_is_the_one_by_hand(tmp_path):
    """Decays 2/11 and 3/12; weights (0.5, 1.5), then (0.75, 2.25)."""
    run, recorder = toy_run(tmp_path, ONE, use_ema=True, ema_decay=0.9, max_train_steps=2)
    run_training(run)
    first = 9 / 11 * 0.5
    second = 0.25 * first + 0.75 * 0.75
    saved = tmp_path / "output" / "checkpoint-2"
    for average in (
        load_file(saved / "ema.safetensors")["ema.weight"],
        load_file(saved / "ema/toy.safetensors")["weight"],
    ):
        assert average.tolist() == pytest.approx([second, 3 * second])
    assert load_file(saved / "toy.safetensors")["weight"].tolist() == [0.75, 2.25]
    assert [step.extra["ema_decay"] for step in steps_of(recorder)] == pytest.approx([2 / 11, 3 / 12])


def test_an_average_of_every_second_step_takes_the_second_and_the_fourth(tmp_path):
    """Decays 3/12 and 5/14 of weights 0.75 and 0.9375."""
    run, _ = toy_run(tmp_path, ONE, use_ema=True, ema_decay=0.9, ema_update_interval=2, max_train_steps=5)
    run_training(run)
    second = 0.75 * 0.75
    fourth = 5 / 14 * second + 9 / 14 * 0.9375
    assert run.model.ema.state_dict()["weight"][0].item() == pytest.approx(fourth)


def test_a_step_that_is_not_finite_moves_nothing_and_the_next_one_does(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, spoiled=[1], use_ema=True, optimizer=MOMENTUM)
    run_training(run)
    # Momentum: -0.5 of (-1, -3), then of 0.9 times that and (-0.5, -1.5).
    assert weights_of(run) == pytest.approx([0.5 + 0.5 * 1.4, 1.5 + 0.5 * 4.2])
    assert [step.loss for step in steps_of(recorder)] == pytest.approx([5, float("nan"), 1.25], nan_ok=True)
    assert [notice.text for notice in recorder.of(Notice)] == ["step 2: loss or gradients not finite, step skipped"]
    first = 9 / 11 * 0.5
    assert run.model.ema.state_dict()["weight"][0].item() == pytest.approx(4 / 13 * first + 9 / 13 * 1.2)


def test_a_skipped_step_leaves_order_slots_and_position_as_they_are(tmp_path):
    images = {name: (1.0, 3.0) for name in "abcde"}
    seen = {}
    for name, spoiled in (("straight", []), ("spoiled", [2, 3, 6])):
        options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 5}
        run, _ = toy_run(tmp_path / name, images, spoiled=spoiled, **options)
        run_training(run)
        seen[name] = [(list(batch.digests), list(batch.slots)) for batch in run.model.family.batches]
        # Three batches an epoch, two a step.
        assert (run.progress.global_step, run.progress.epoch, run.progress.position) == (5, 3, 1)
    assert seen["straight"] == seen["spoiled"]


def test_a_good_step_forgives_the_bad_ones_before_it(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, spoiled=[0, 1, 2, 3, 5, 6, 7, 8], max_train_steps=10)
    run_training(run)
    assert run.skips.in_a_row == 0
    assert weights_of(run) == [0.75, 2.25]
    assert len(steps_of(recorder)) == 10


def test_five_bad_steps_in_a_row_end_the_run_and_leave_its_checkpoints_alone(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, spoiled=range(1, 9), max_train_steps=10, checkpoint_step_interval=1)
    with pytest.raises(DivergedError, match=r"5 steps in a row, up to step 6.*caption of a"):
        run_training(run)
    assert [event.step for event in recorder.of(CheckpointSaved)] == [1]
    assert weights_of(run) == [0.5, 1.5]


@pytest.mark.parametrize(
    ("method", "limit", "expected", "reported"),
    [
        ("value", 3.5, (1.5, 1.75), 4),
        ("norm", 1.0, (0.3, 0.4), 5),
        ("norm", 10.0, (1.5, 2.0), 5),
        ("norm", 0.0, (1.5, 2.0), 5),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_gradients_are_clipped_as_they_are_whatever_the_loss_scale(tmp_path, method, limit, expected, reported, scale):
    """The gradient is (-3, -4), its norm 5."""
    options = {"grad_clip_method": method, "max_grad_norm": limit, "max_train_steps": 1}
    run, recorder = toy_run(tmp_path, {"a": (3.0, 4.0)}, **options)
    run.progress.loss_scale = LossScale(scale > 1, scale)
    run_training(run)
    assert weights_of(run) == pytest.approx(expected)
    assert steps_of(recorder)[0].grad_norm == pytest.approx(reported)
    assert steps_of(recorder)[0].loss == pytest.approx(12.5)


def test_an_overflow_halves_the_scale_and_counts_as_no_divergence(tmp_path):
    run, _ = toy_run(tmp_path, ONE, spoiled=range(6), max_train_steps=8)
    run.progress.loss_scale = LossScale(True, 2.0**16)
    run_training(run)
    assert run.progress.loss_scale.scale == 2.0**10
    assert run.progress.loss_scale.good_steps == 2
    assert weights_of(run) == [0.75, 2.25]


def test_epochs_are_counted_across_their_edge(tmp_path):
    """Three batches an epoch, two a step: step 2 begins in the first epoch and ends in the second."""
    images = {name: (1.0, 3.0) for name in "abc"}
    options = {"gradient_accumulation_steps": 2, "checkpoint_epoch_interval": 1, "max_train_steps": 5}
    run, recorder = toy_run(tmp_path, images, **options, checkpoints_total_limit=0)
    run_training(run)
    assert [step.epoch for step in steps_of(recorder)] == [1, 1, 2, 3, 3]
    assert [event.step for event in recorder.of(CheckpointSaved)] == [2, 3, 5]
    states = [load_state(tmp_path, step) for step in (2, 3, 5)]
    assert [(each["epoch"], each["position"]) for each in states] == [(1, 1), (2, 0), (3, 1)]
    names = [digest for batch in run.model.family.batches for digest in batch.digests]
    assert sorted(names[:3]) == sorted(names[3:6]) == sorted(names[6:9]) == ["a", "b", "c"]


def load_state(folder, step: int) -> dict:
    return json.loads((folder / "output" / f"checkpoint-{step}" / "training_state.json").read_text())["state"]


def test_epochs_become_steps(tmp_path):
    images = {name: (1.0, 3.0) for name in "abcde"}
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "max_train_steps": 0, "num_train_epochs": 3}
    run, _ = toy_run(tmp_path, images, **options)
    assert run.max_train_steps == 5  # 9 batches, two a step


def test_regularisation_pulls_to_the_base_and_is_reported_apart(tmp_path):
    """A window of both: the mean of the gradients (w - t) and (w - 0), since the base predicts zeros."""
    data = [ToyDataset(ONE), ToyDataset({"r": (50.0, 50.0)}, id="kept", is_regularisation=True)]
    run, recorder = toy_run(tmp_path, data, gradient_accumulation_steps=2, max_train_steps=2)
    run_training(run)
    first, second = steps_of(recorder)
    assert (first.loss, first.extra["regularisation_loss"], first.is_regularisation) == (2.5, 0, False)
    # Weights (0.25, 0.75): 5.625 / 2 from the image, 0.625 / 2 from the base.
    assert (second.loss, second.extra["regularisation_loss"]) == (pytest.approx(1.5625), pytest.approx(0.3125))
    assert weights_of(run) == pytest.approx([0.375, 1.125])
    [bins] = recorder.of(LossBySigma)
    assert sum(count for *_, count in bins.bins) == 2  # the image's alone
    assert sorted(loss for *_, loss, _ in bins.bins) == pytest.approx([2.8125, 5])


def test_a_run_goes_on_from_a_checkpoint_to_the_numbers_by_hand(tmp_path):
    """Momentum 0.9, rate 0.5, and an average: three steps at once, or one and two."""
    images = {name: (1.0, 3.0) for name in "ab"}
    options = {"use_ema": True, "ema_decay": 0.9, "checkpoint_step_interval": 1, "optimizer": MOMENTUM}
    weight = speed = average = 0.0
    for step in (1, 2, 3):
        speed = 0.9 * speed + (weight - 1)
        weight -= 0.5 * speed
        decay = (1 + step) / (10 + step)
        average = decay * average + (1 - decay) * weight
    straight, _ = toy_run(tmp_path / "straight", images, **options)
    run_training(straight)
    run_training(toy_run(tmp_path / "stopped", images, **options | {"max_train_steps": 1})[0])
    resumed, recorder = toy_run(tmp_path / "stopped", images, **options)
    load_checkpoint(resumed, tmp_path / "stopped/output/checkpoint-1")
    assert resumed.progress.global_step == 1
    run_training(resumed)
    for run in (straight, resumed):
        assert weights_of(run) == pytest.approx([weight, 3 * weight])
        assert run.model.ema.state_dict()["weight"].tolist() == pytest.approx([average, 3 * average])
    assert [step.step for step in steps_of(recorder)] == [2, 3]
    batches = [[batch.digests for batch in run.model.family.batches] for run in (straight, resumed)]
    assert batches[0][1:] == batches[1]
    assert straight.model.family.noisy[1:][0].tolist() == resumed.model.family.noisy[0].tolist()


def test_a_checkpoint_keeps_the_loss_scale(tmp_path):
    run, _ = toy_run(tmp_path / "scaled", ONE, spoiled=[1], max_train_steps=3)
    run.progress.loss_scale = LossScale(True, 2.0**16)
    run_training(run)
    resumed, _ = toy_run(tmp_path / "scaled", ONE)
    resumed.progress.loss_scale = LossScale(True)
    load_checkpoint(resumed, tmp_path / "scaled/output/checkpoint-3")
    assert (resumed.progress.loss_scale.scale, resumed.progress.loss_scale.good_steps) == (2.0**15, 1)


def test_a_run_that_learns_no_more_ends_after_its_patience_and_keeps_the_best(tmp_path):
    options = {"eval_steps_interval": 1, "early_stopping_patience": 2, "checkpoint_keep_best": True}
    run, recorder = toy_run(tmp_path, ONE, losses=[5, 4, 4.5, 4.25, 3], max_train_steps=10, **options)
    run_training(run)
    assert [(event.step, event.pooled) for event in recorder.of(EvalDone)] == [(0, 5), (1, 4), (2, 4.5), (3, 4.25)]
    assert [(event.step, event.eval_loss) for event in recorder.of(CheckpointSaved)] == [(1, 4), (3, None)]
    assert load_file(tmp_path / "output/checkpoint-best/toy.safetensors")["weight"].tolist() == [0.5, 1.5]
    resumed, _ = toy_run(tmp_path, ONE, max_train_steps=10, **options)
    load_checkpoint(resumed, tmp_path / "output/checkpoint-3")
    # The checkpoint of step 3 was written after its evaluation, so it knows all of them.
    assert resumed.progress.eval_losses == {0: 5, 1: 4, 2: 4.5, 3: 4.25}
    assert resumed.is_finished


def test_a_checkpoint_comes_before_the_evaluation_and_the_images_of_its_step(tmp_path):
    order = []
    run, recorder = toy_run(
        tmp_path, ONE, losses=[5, 4, 3], max_train_steps=4, eval_steps_interval=2, checkpoint_step_interval=2,
        validation_step_interval=2, validate_after_step=3, checkpoint_keep_best=False,
    )  # fmt: skip
    run.validator = SimpleNamespace(
        has_generated=lambda step, ema: True, run=lambda *a: order.append(("images", a[-1]))
    )
    recorder.handle = lambda event: order.append((type(event).__name__, getattr(event, "step", None)))
    run_training(run)
    wanted = [each for each in order if each[0] in ("CheckpointSaved", "EvalDone", "images")]
    assert wanted == [
        ("EvalDone", 0),
        ("images", 0),
        ("CheckpointSaved", 2),
        ("EvalDone", 2),
        ("CheckpointSaved", 4),
        ("EvalDone", 4),
        ("images", 4),
    ]


def test_a_signal_saves_the_step_that_it_interrupts_once(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=9, checkpoint_step_interval=2)

    def stop_at_two(event):
        recorder.events.append(event)
        if isinstance(event, StepDone) and event.step == 2:
            run.session.stop.received = signal.SIGINT

    recorder.handle = stop_at_two
    with pytest.raises(Interrupted, match=r"stopped by SIGINT: saved .*checkpoint-2") as caught:
        run_training(run)
    assert caught.value.exit_code == 130
    assert [event.step for event in recorder.of(CheckpointSaved)] == [2]
    assert load_file(tmp_path / "output/checkpoint-2/toy.safetensors")["weight"].tolist() == [0.75, 2.25]


class Rounding(torch.optim.SGD):
    """Draws, as optimizers that round stochastically do."""

    def step(self, closure=None):
        super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            parameter.data += torch.rand(2)


def test_two_processes_train_the_global_batch_and_draw_dropout_apart(tmp_path):
    """Three images, two at a time: the second step has one image, and the second process one that does not count."""
    images = {"a": (1.0, 3.0), "b": (3.0, 1.0), "c": (2.0, 8.0)}

    def train(process_group, optimizer=None):
        folder = tmp_path / f"{process_group.rank}-{optimizer}"
        run, recorder = toy_run(folder, images, process_group=process_group, optimizer=optimizer, max_train_steps=2)
        run.session.checkpoints = SimpleNamespace(
            save=lambda run: Saved(Path(), True), path_of=lambda step: "", settle=list
        )
        run_training(run)
        return {
            "weights": weights_of(run),
            "numbers": [(step.loss, step.grad_norm, step.samples) for step in steps_of(recorder)],
            "batches": [[*each.digests, *each.slots, *each.loss_weights.tolist()] for each in run.model.family.batches],
            "draws": run.model.family.draws,
        }

    def work(process_group):
        return [train(process_group), train(process_group), train(process_group, Rounding)]

    (main, again, rounded), (other, _, other_rounded) = in_processes(2, work)
    assert main == again
    (name, slot, weight), (last, *rest) = main["batches"]
    (other_name, other_slot, other_weight), (filler, *other_rest) = other["batches"]
    assert (slot, weight, other_slot, other_weight) == (0, 1, 1, 1)
    assert (rest, other_rest) == ([0, 1], [1, 0])
    assert {name, other_name, last} == {"a", "b", "c"}
    assert filler in images
    mean = [(x + y) / 2 for x, y in zip(images[name], images[other_name], strict=True)]
    first = [0.5 * x for x in mean]
    assert main["weights"] == other["weights"]
    assert main["weights"] == pytest.approx([w + 0.5 * (t - w) for w, t in zip(first, images[last], strict=True)])
    loss = sum(t * t for each in (name, other_name) for t in images[each]) / 4
    assert main["numbers"][0] == pytest.approx([loss, sum(x * x for x in mean) ** 0.5, 2])
    assert main["numbers"][1][2] == 1
    assert main["numbers"] == other["numbers"]
    assert not set(main["draws"]) & set(other["draws"])
    assert len(set(main["draws"])) == 2  # one a step
    assert rounded["weights"] == other_rounded["weights"]


def test_an_evaluation_comes_at_the_start_at_its_interval_and_at_the_end(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, losses=range(9, 0, -1), max_train_steps=3, eval_steps_interval=2)
    run_training(run)
    assert [event.step for event in recorder.of(EvalDone)] == [0, 2, 3]
    images = {name: (1.0, 3.0) for name in "abc"}
    run, recorder = toy_run(tmp_path / "b", images, losses=range(9, 0, -1), max_train_steps=4, eval_epoch_interval=1)
    run_training(run)
    assert [event.step for event in recorder.of(EvalDone)] == [0, 3, 4]


def test_a_step_says_whether_it_saw_regularisation_alone(tmp_path):
    """Weights of 0 answer as the base does, so both losses of a window are 0: only the field states its kind."""
    for is_regularisation in (True, False):
        data = [ToyDataset({"a": (0.0, 0.0)}, is_regularisation=is_regularisation)]
        data.append(ToyDataset({"b": (0.0, 0.0)}, id="kept", is_regularisation=True))
        folder = tmp_path / str(is_regularisation)
        folder.mkdir()
        run, recorder = toy_run(folder, data, gradient_accumulation_steps=2, max_train_steps=1)
        run_training(run)
        [step] = steps_of(recorder)
        assert (step.loss, step.extra["regularisation_loss"], step.is_regularisation) == (0, 0, is_regularisation)


def test_a_checkpoint_that_is_due_at_a_skipped_step_is_saved_after_the_next_good_one(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, spoiled=[1, 2], max_train_steps=6, checkpoint_step_interval=2)
    run_training(run)
    assert [event.step for event in recorder.of(CheckpointSaved)] == [4, 6]
    assert [event.text for event in recorder.of(Notice) if "checkpoint-" in event.text] == [
        "checkpoint-2 is not saved, its step was skipped: one is saved after the next step that is not"
    ]
    run, recorder = toy_run(tmp_path / "b", ONE, spoiled=[1], max_train_steps=6, checkpoint_step_interval=2)
    run_training(run)
    assert [event.step for event in recorder.of(CheckpointSaved)] == [3, 4, 6]


class Judging:
    """An eval loss that is the first weight: 0 without the adapter."""

    identity = {"datasets": ["held_out"]}

    def run(self, denoiser):
        loss = float(denoiser.weight[0])
        return EvalResult({"held_out": loss}, loss, [(0.5, loss)])


def test_the_base_is_the_reference_of_a_new_run_and_of_one_that_goes_on(tmp_path):
    options = {"eval_steps_interval": 1, "checkpoint_step_interval": 1}
    for steps in (1, 2):
        run, recorder = toy_run(tmp_path, ONE, max_train_steps=steps, **options)
        run.evaluator = Judging()
        if steps == 2:
            load_checkpoint(run, tmp_path / "output/checkpoint-1")
        run_training(run)
        assert [event.reference for event in recorder.of(EvalDone)] == [0] * len(recorder.of(EvalDone))
    assert recorder.of(EvalDone)[-1].pooled == 0.75
    assert weights_of(run) == [0.75, 2.25]


def test_a_mask_that_is_not_drawn_does_not_count(tmp_path):
    """With a probability of 0 the empty mask leaves the image as it is."""
    data = [ToyDataset(ONE, mask_of={"a": 0.0})]
    run, _ = toy_run(tmp_path, data, max_train_steps=1, masked_loss_probability=0.0)
    run_training(run)
    assert weights_of(run) == [0.5, 1.5]


class Drawing:
    """A validator that notes the steps at which it is asked."""

    def __init__(self):
        self.steps = []

    def run(self, denoiser, adapter, ema, step):
        self.steps.append(step)

    def has_generated(self, step, ema):
        return False


def test_images_begin_at_the_step_that_ends_the_epoch_they_wait_for(tmp_path):
    """Two steps are an epoch. The first images are those of the base."""
    images = {name: (1.0, 3.0) for name in "ab"}
    run, _ = toy_run(tmp_path, images, max_train_steps=4, validation_step_interval=1, validate_after_epoch=1)
    run.validator = Drawing()
    run_training(run)
    assert run.validator.steps == [0, 2, 3, 4]


def test_a_resumed_run_makes_up_for_the_evaluation_of_its_step_with_accumulation_too(tmp_path):
    """A step is half an epoch: the second one goes from 0.5 to 1 and crosses 0.6."""
    images = {name: (1.0, 3.0) for name in "abcd"}
    options = {"gradient_accumulation_steps": 2, "eval_epoch_interval": 0.6, "checkpoint_step_interval": 1}
    run, recorder = toy_run(tmp_path, images, losses=[9, 8, 7], max_train_steps=2, **options)
    run_training(run)
    assert [event.step for event in recorder.of(EvalDone)] == [0, 2]
    run, recorder = toy_run(tmp_path, images, losses=[7, 7, 6], max_train_steps=3, **options)
    load_checkpoint(run, tmp_path / "output/checkpoint-2")  # saved before the evaluation
    run_training(run)
    assert [event.step for event in recorder.of(EvalDone)] == [2, 3]


def test_a_step_that_is_taken_again_keeps_no_gradient_of_the_first_try(tmp_path):
    """Memory does not suffice for the second of its two micro-batches, once."""
    images = {"a": (1.0, 3.0), "b": (1.0, 3.0)}
    run, recorder = toy_run(tmp_path, images, gradient_accumulation_steps=2, max_train_steps=1)
    run.model.gradient_checkpointing = SimpleNamespace(recompute_more=lambda: True, after_step=lambda: ())
    predict, calls = run.model.family.predict, []

    def short_once(*given):
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError("not enough")
        return predict(*given)

    run.model.family.predict = short_once
    run_training(run)
    assert len(calls) == 4
    assert weights_of(run) == [0.5, 1.5]  # half of the way, as in one try
    assert [step.loss for step in steps_of(recorder)] == [5]
