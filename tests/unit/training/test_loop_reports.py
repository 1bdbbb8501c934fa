"""What the loop reports, when something is due, and what it asks of others; numbers by hand (`tests/toy.py`)."""

from __future__ import annotations

import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from simpletuner.errors import Interrupted
from simpletuner.reporting.events import CheckpointSaved, EvalDone, LossBySigma, Notice, StepDone
from simpletuner.training.checkpoint import Checkpoints, load_checkpoint
from simpletuner.training.loop import run_training
from simpletuner.training.loss_scale import LossScale
from simpletuner.training.objective import Objective
from simpletuner.training.progress import Progress
from tests.toy import toy_run, weights_of

ONE = {"a": (1.0, 3.0)}


def images_called(names: str) -> dict[str, tuple[float, float]]:
    return {name: (1.0, 3.0) for name in names}


def saved(recorder) -> list[int]:
    return [event.step for event in recorder.of(CheckpointSaved)]


def evaluated(recorder) -> list[int]:
    return [event.step for event in recorder.of(EvalDone)]


class Watching:
    """A validator that notes the step, the weights and the average that it was given, and leaves the mode changed."""

    def __init__(self) -> None:
        self.steps, self.weights, self.asked = [], [], []

    def run(self, denoiser, adapter, ema, step) -> None:
        self.steps.append(step)
        self.weights.append(denoiser.weight.tolist())
        denoiser.eval()

    def has_generated(self, step, ema) -> bool:
        self.asked.append((step, ema))
        return True


class Averaging(torch.optim.SGD):
    """Its weights are averages outside of training, as schedule-free optimizers have it: here 42."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.param_groups[0]["train_mode"] = True

    @torch.no_grad()
    def eval(self) -> None:
        self.param_groups[0]["train_mode"] = False
        for parameter in self.param_groups[0]["params"]:
            parameter.fill_(42.0)


# ---- when something is due -----------------------------------------------------------------------------------------


def test_a_share_of_an_epoch_is_the_decimal_number_that_was_written(tmp_path):
    """Ten images: 0.2 of an epoch are two steps, although the float 0.2 is a little more than a fifth."""
    options = {"losses": range(9), "max_train_steps": 5, "eval_epoch_interval": 0.2}
    run, recorder = toy_run(tmp_path, images_called("abcdefghij"), **options)
    run_training(run)
    assert evaluated(recorder) == [0, 2, 4, 5]


def test_both_intervals_count_where_both_are_written(tmp_path):
    options = {"checkpoint_step_interval": 4, "checkpoint_epoch_interval": 1, "max_train_steps": 9}
    run, recorder = toy_run(tmp_path, images_called("abc"), **options)
    run_training(run)
    assert saved(recorder) == [3, 4, 6, 8, 9]


def test_images_come_by_epochs_and_at_the_end_from_the_averages_and_training_goes_on_in_its_mode(tmp_path):
    options = {"optimizer": Averaging, "max_train_steps": 5, "validation_step_interval": 0}
    run, _ = toy_run(tmp_path, images_called("ab"), validation_epoch_interval=1, **options)
    run.validator = Watching()
    run_training(run)
    assert run.validator.steps == [0, 2, 4, 5]
    assert run.validator.weights == [[42, 42]] * 4
    assert run.model.denoiser.training
    assert weights_of(run) == pytest.approx([1 - 1 / 32, 3 * (1 - 1 / 32)])


def test_images_begin_at_the_step_that_is_written(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=4, validation_step_interval=1, validate_after_step=3)
    run.validator = Watching()
    run_training(run)
    assert run.validator.steps == [0, 3, 4]


def resumed_at(folder, step: int, position: int = 0, epoch: int = 0, **options):
    run, recorder = toy_run(folder, images_called("abcd"), losses=[9, 8, 7, 6, 5], **options)
    run.progress = Progress(step, epoch, position)
    return run, recorder


def test_a_resumed_run_evaluates_its_step_where_that_is_due_and_not_known(tmp_path):
    """Four images: step 4 ends an epoch. One that stands a quarter into it has crossed none, whatever a step takes."""
    options = {"eval_epoch_interval": 1, "max_train_steps": 6}
    run, recorder = resumed_at(tmp_path / "due", 4, epoch=1, **options)
    run_training(run)
    assert evaluated(recorder) == [4, 6]
    run, recorder = resumed_at(tmp_path / "known", 4, epoch=1, **options)
    run.progress.eval_losses = {4: 3.0}
    run_training(run)
    assert evaluated(recorder) == [6]
    run, recorder = resumed_at(tmp_path / "early", 1, 1, gradient_accumulation_steps=2, **options)
    run_training(run)
    assert evaluated(recorder) == [3, 5, 6]
    run, recorder = toy_run(tmp_path / "first", ONE, losses=[9, 8, 7], eval_epoch_interval=1, max_train_steps=2)
    run.progress = Progress(1, 1, 0)
    run_training(run)
    assert evaluated(recorder) == [1, 2]


def test_images_that_a_resumed_run_has_are_asked_for_by_step_and_average(tmp_path):
    run, _ = resumed_at(tmp_path, 2, 2, use_ema=True, max_train_steps=3, validation_step_interval=2)
    run.validator = Watching()
    run_training(run)
    assert run.validator.asked == [(2, run.model.ema)]
    assert run.validator.steps == [3]


# ---- what is reported ----------------------------------------------------------------------------------------------


def test_the_loss_by_noise_level_says_from_which_step_to_which(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=102)
    run_training(run)
    first, last = recorder.of(LossBySigma)
    assert [(each.first_step, each.step) for each in (first, last)] == [(1, 100), (101, 102)]
    assert [sum(count for *_, count in each.bins) for each in (first, last)] == [100, 2]


def test_a_step_reports_where_a_run_of_epochs_ends_and_the_memory(tmp_path):
    options = {"max_train_steps": 0, "num_train_epochs": 2}
    run, recorder = toy_run(tmp_path, images_called("ab"), **options)
    run_training(run)
    steps = recorder.of(StepDone)
    assert [(each.step, each.total_steps) for each in steps] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(each.memory_gb > 0.01 for each in steps)


def test_steps_of_zero_are_reported_by_the_loop_at_the_end_of_a_short_run(tmp_path):
    """The target is what the weights are already: loss and gradient are 0."""
    run, recorder = toy_run(tmp_path, {"a": (0.0, 0.0)}, max_train_steps=2)
    run_training(run)
    [text] = [event.text for event in recorder.of(Notice)]
    assert text.startswith("step 2: loss and gradient were exactly 0 for 2 steps in a row")


def test_a_gradient_of_zero_is_seen_beside_a_loss(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=2)
    run.model.family.predict = lambda denoiser, noisy, *rest: denoiser(noisy) * 0
    run_training(run)
    [text] = [event.text for event in recorder.of(Notice)]
    assert text.startswith("step 2: the gradient was exactly 0")


def test_a_checkpoint_that_was_there_is_not_reported_as_new(tmp_path):
    options = {"checkpoint_step_interval": 1, "checkpoints_total_limit": 0}
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=2, **options)
    run_training(run)
    assert [event.is_new for event in recorder.of(CheckpointSaved)] == [True, True]
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=3, **options)
    load_checkpoint(run, tmp_path / "output/checkpoint-1")
    run_training(run)
    assert [(event.step, event.is_new) for event in recorder.of(CheckpointSaved)] == [(2, False), (3, True)]


def test_what_blocks_keep_is_logged_as_it_changes(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=2)
    lines = [["keeps 3 blocks"], []]
    run.model.gradient_checkpointing = SimpleNamespace(after_step=lambda: lines.pop(0))
    run_training(run)
    assert [(event.severity, event.text) for event in recorder.of(Notice)] == [("info", "keeps 3 blocks")]


def test_overflows_are_neither_skipped_steps_nor_divergence(tmp_path):
    """Twelve overflows of 60 steps: as skipped steps they would be a fifth of the recent ones."""
    run, recorder = toy_run(tmp_path, ONE, spoiled=range(0, 60, 5), max_train_steps=60)
    run.progress.loss_scale = LossScale(True, 2.0**16)
    run_training(run)
    assert run.progress.global_step == 60
    assert recorder.of(Notice) == []


# ---- what is asked of others ---------------------------------------------------------------------------------------


def test_a_folder_that_is_gone_is_looked_for_after_each_step_by_the_main_process(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=3)
    looked = []
    run.session.guard = SimpleNamespace(require=lambda: looked.append(len(recorder.of(StepDone))))
    run_training(run)
    assert looked == [1, 2, 3]


def test_copies_are_compared_before_each_checkpoint(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=3, checkpoint_step_interval=2)
    compared = []
    run.model.placement.check = compared.append
    run_training(run)
    assert compared == ["after step 2", "after step 3"]


def test_the_last_micro_batch_of_a_window_is_the_last_backward_pass(tmp_path):
    options = {"gradient_accumulation_steps": 3, "max_train_steps": 2}
    run, _ = toy_run(tmp_path, images_called("abcdef"), **options)
    passes, backward = [], run.model.placement.backward

    def noting(loss, is_last):
        passes.append(is_last)
        backward(loss, is_last)

    run.model.placement.backward = noting
    run_training(run)
    assert passes == [False, False, True] * 2


@pytest.mark.parametrize(("method", "limit", "reported"), [("norm", 5.0, 10), ("value", 2.0, 8), ("norm", 0.0, 10)])
def test_norms_are_those_of_all_processes(tmp_path, method, limit, reported):
    """This process holds (-3, -4), with norm 5 and largest 4; all processes together have twice of each."""
    run, recorder = toy_run(
        tmp_path, {"a": (3.0, 4.0)}, grad_clip_method=method, max_grad_norm=limit, max_train_steps=1
    )
    run.model.placement.norm_of_all = run.model.placement.largest_of_all = lambda value: value * 2
    run_training(run)
    assert recorder.of(StepDone)[0].grad_norm == pytest.approx(reported)
    expected = {5.0: [0.75, 1.0], 2.0: [1.0, 1.0], 0.0: [1.5, 2.0]}[limit]
    assert weights_of(run) == pytest.approx(expected)


class Pair:
    """A process group of which the other process adds `others` to the numbers of a step."""

    def __init__(self, group, others) -> None:
        self._group, self.others, self.told = group, others, []

    def __getattr__(self, name):
        return getattr(self._group, name)

    def sum(self, numbers):
        if len(numbers) != len(self.others):
            return self._group.sum(numbers)
        self.told.append(list(numbers))
        return [mine + other for mine, other in zip(numbers, self.others, strict=True)]


def test_one_process_that_is_asked_to_stop_stops_all_after_a_checkpoint(tmp_path):
    """Of the six numbers of a step the fifth counts those that were asked, the sixth the samples."""
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=9)
    run.session.process_group = Pair(run.session.process_group, [0, 0, 0, 0, 1, 2])
    with pytest.raises(Interrupted, match=r"stopped by SIGTERM: saved .*checkpoint-1"):
        run_training(run)
    assert run.session.process_group.told == [[5, 1, 0, 0, False, 1]]
    assert [step.samples for step in recorder.of(StepDone)] == [3]
    assert saved(recorder) == [1]


def test_a_process_tells_the_others_that_it_was_asked_to_stop(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=9)
    run.session.process_group = Pair(replace(run.session.process_group), [0] * 6)
    run.session.bus._sinks[0].handle = lambda event: None
    predict = run.model.family.predict

    def asked_meanwhile(*given):
        run.session.stop.received = signal.SIGTERM
        return predict(*given)

    run.model.family.predict = asked_meanwhile
    with pytest.raises(Interrupted):
        run_training(run)
    assert run.session.process_group.told == [[5, 1, 0, 0, True, 1]]


def test_a_run_that_is_asked_to_stop_before_its_first_step_saves_nothing(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=9)
    run.session.stop.received = signal.SIGINT
    with pytest.raises(Interrupted, match="stopped by SIGINT: nothing was trained yet"):
        run_training(run)
    assert Checkpoints(tmp_path / "output", None).found() == []


# ---- noise of a step -----------------------------------------------------------------------------------------------


def test_levels_are_shared_out_over_the_whole_window(tmp_path):
    """Four samples in micro-batches of two: each gets another quarter of the levels, whose quantiles end at .25, .5."""
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2, "timestep_stratified": True}
    run, _ = toy_run(tmp_path, images_called("abcd"), max_train_steps=3, **options)
    run_training(run)
    for step in range(3):
        sigmas = torch.cat(run.model.family.sigmas[2 * step : 2 * step + 2])
        quarters = torch.special.ndtr(torch.logit(sigmas.double())).mul(4).floor()
        assert sorted(quarters.tolist()) == [0, 1, 2, 3]


def test_perturbation_comes_on_top_of_the_offset_and_both_follow_their_step(tmp_path):
    """Images of zeros show the noise. A perturbation over 2 steps is gone in the third."""
    offset = Objective(noise_offset=0.5, noise_offset_probability=1.0)
    perturbation = {"input_perturbation": 0.25, "input_perturbation_steps": 2}
    objectives = [Objective(), offset, Objective(**perturbation), replace(offset, **perturbation)]
    seen = []
    for number, objective in enumerate(objectives):
        options = {"gradient_accumulation_steps": 2, "max_train_steps": 3}
        run, _ = toy_run(tmp_path / str(number), {"a": (0.0, 0.0), "b": (0.0, 0.0)}, **options)
        run.objective = objective
        run_training(run)
        family = run.model.family
        seen.append([noisy.flatten() / sigma for noisy, sigma in zip(family.noisy, family.sigmas, strict=True)])
    for number, (plain, moved, perturbed, both) in enumerate(zip(*seen, strict=True)):
        torch.testing.assert_close(both - moved, perturbed - plain, atol=1e-5, rtol=1e-4)
        assert torch.equal(perturbed, plain) is (number >= 4)
    offsets = {round(float((moved - plain)[0]), 3) for plain, moved in zip(*seen[:2], strict=True)}
    assert len(offsets) == 6  # one for each step and slot


def test_a_step_that_is_taken_again_is_named_with_its_reason(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=2)
    run.model.gradient_checkpointing = SimpleNamespace(recompute_more=lambda: True, after_step=lambda: ())
    predict, calls = run.model.family.predict, []

    def short_in_the_second_step(*given):
        calls.append(given)
        if len(calls) == 2:
            raise MemoryError("not enough\nand more")
        return predict(*given)

    run.model.family.predict = short_in_the_second_step
    run_training(run)
    [notice] = recorder.of(Notice)
    assert notice.text == "step 2 is taken again with more blocks recomputed: not enough"
