"""What is not finite is never committed, ends the run, and is named (`tests/toy.py` has the arithmetic)."""

from __future__ import annotations

import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from simpletuner.errors import DivergedError
from simpletuner.reporting.events import CheckpointSaved
from simpletuner.training.checkpoint import load_checkpoint
from simpletuner.training.divergence import UNTOUCHED, Skips, _bad_base, non_finite, require_finite
from simpletuner.training.loop import run_training
from simpletuner.training.progress import Progress
from tests.processes import in_processes
from tests.toy import toy_run, weights_of

ONE = {"a": (1.0, 3.0)}
MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


class Poisoned(torch.optim.SGD):
    """Leaves NaN in a weight, or in its own state, at its n-th step."""

    def __init__(self, parameters, *, at: int, state: str = "", **keys):
        super().__init__(parameters, **keys)
        self.at, self.count, self.poisoned = at, 0, state

    def step(self, closure=None):
        super().step(closure)
        self.count += 1
        if self.count == self.at:
            parameter = self.param_groups[0]["params"][0]
            (self.state[parameter][self.poisoned] if self.poisoned else parameter.data)[0] = torch.nan


def saved(recorder) -> list[int]:
    return [event.step for event in recorder.of(CheckpointSaved)]


def folders(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "output").glob("checkpoint-*"))


@pytest.mark.parametrize("state", ["", "momentum_buffer"])
def test_weights_and_states_that_are_not_finite_are_never_saved_and_rotate_nothing(tmp_path, state):
    optimizer = partial(Poisoned, at=4, state=state, momentum=0.9)
    options = {"max_train_steps": 10, "checkpoint_step_interval": 1, "checkpoints_total_limit": 2}
    run, recorder = toy_run(tmp_path, ONE, optimizer=optimizer, **options)
    with pytest.raises(
        DivergedError, match=r"(?s)not finite after the update of step 4.*it was 0.5.*checkpoint-3"
    ) as caught:
        run_training(run)
    assert caught.value.exit_code == 4
    assert saved(recorder) == [1, 2, 3]
    assert folders(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    again, _ = toy_run(tmp_path, ONE, optimizer=partial(Poisoned, at=0, momentum=0.9), **options)
    load_checkpoint(again, tmp_path / "output/checkpoint-3")
    run_training(again)
    assert again.progress.global_step == 10


def test_without_a_checkpoint_interval_the_update_is_found_at_the_next_step_and_at_the_last_one(tmp_path):
    for at, steps in ((2, 9), (3, 3)):
        run, recorder = toy_run(tmp_path / str(at), ONE, optimizer=partial(Poisoned, at=at), max_train_steps=steps)
        with pytest.raises(DivergedError, match=f"weights are not finite after the update of step {at}"):
            run_training(run)
        assert run.progress.global_step == at
        assert saved(recorder) == []


def test_a_checkpoint_that_is_due_at_a_skipped_step_comes_after_the_next_good_one(tmp_path):
    options = {"max_train_steps": 9, "checkpoint_step_interval": 2, "checkpoints_total_limit": 0}
    run, recorder = toy_run(tmp_path, ONE, spoiled=[3, 4], **options)
    run_training(run)
    assert saved(recorder) == [2, 6, 8, 9]


def test_a_run_stopped_at_a_skipped_step_saves_the_last_good_one_and_goes_on_to_the_same_bits(tmp_path):
    options = {"max_train_steps": 6, "optimizer": MOMENTUM, "use_ema": True}
    straight, _ = toy_run(tmp_path / "straight", ONE, spoiled=[2, 3], **options)
    run_training(straight)
    stopped, recorder = toy_run(tmp_path / "stopped", ONE, spoiled=[2, 3], **options | {"max_train_steps": 4})
    run_training(stopped)
    assert saved(recorder) == [2]
    assert load_file(tmp_path / "stopped/output/checkpoint-2/toy.safetensors")["weight"].tolist() == weights_of(stopped)
    resumed, _ = toy_run(tmp_path / "stopped", ONE, spoiled=[0, 1], **options)
    load_checkpoint(resumed, tmp_path / "stopped/output/checkpoint-2")
    assert (resumed.progress.global_step, resumed.skips.in_a_row) == (2, 0)
    run_training(resumed)
    assert weights_of(resumed) == weights_of(straight)
    assert torch.equal(resumed.model.ema.state_dict()["weight"], straight.model.ema.state_dict()["weight"])


def test_every_fifth_step_skipped_ends_the_run_too(tmp_path):
    run, _ = toy_run(tmp_path, ONE, spoiled=range(0, 200, 5), max_train_steps=200)
    with pytest.raises(DivergedError, match=r"for 10 of the last 46 steps, up to step 46"):
        run_training(run)


def test_one_bad_step_in_ten_goes_on(tmp_path):
    run, _ = toy_run(tmp_path, ONE, spoiled=range(0, 120, 10), max_train_steps=120)
    run_training(run)
    assert run.progress.global_step == 120


def test_with_a_limit_of_one_the_checkpoint_before_stays_until_the_new_one_has_shown_a_finite_loss(tmp_path):
    options = {"max_train_steps": 20, "checkpoint_step_interval": 2, "checkpoints_total_limit": 1}
    run, _ = toy_run(tmp_path, ONE, spoiled=range(4, 20), **options)
    with pytest.raises(DivergedError, match="resume_from_checkpoint=checkpoint-2"):
        run_training(run)
    assert folders(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    again, _ = toy_run(tmp_path, ONE, **options | {"max_train_steps": 5})
    load_checkpoint(again, tmp_path / "output/checkpoint-4")
    run_training(again)
    assert folders(tmp_path) == ["checkpoint-4", "checkpoint-5"]


def test_the_message_names_the_samples_that_are_not_finite_and_no_others(tmp_path):
    images = {"good": (1.0, 3.0), "bad": (float("nan"), 0.0)}
    run, _ = toy_run(tmp_path, images, train_batch_size=2, max_train_steps=9)
    with pytest.raises(DivergedError) as caught:
        run_training(run)
    text = str(caught.value)
    assert "caption of bad" in text
    assert "caption of good" not in text
    assert "latents of" in text
    assert "remove the image" in text


def test_weights_that_make_the_loss_infinite_are_reported_and_a_lower_rate_helps(tmp_path):
    """Each step of 10 times the gradient makes the distance 9 times as large, until its square is no float32."""
    options = {"max_train_steps": 40, "checkpoint_step_interval": 0}
    run, _ = toy_run(tmp_path, ONE, **options, learning_rate=10)
    run.model.adapter.can_be_disabled = True
    with pytest.raises(
        DivergedError, match=r"(?s)trained weights are the reason.*as large as 3.65e\+19.*lower learning_rate \(10\)"
    ):
        run_training(run)
    run, _ = toy_run(tmp_path, ONE, **options, learning_rate=0.5)
    run_training(run)


def test_an_overflow_of_fp16_is_reported_and_bf16_helps(tmp_path, monkeypatch):
    """Weights of the network alone are in fp16 products: 300 times 300 is more than 65,504."""
    options = {"max_train_steps": 40, "learning_rate": 1e-6}
    factors = torch.full((1, 2), 300.0)
    for precision in ("fp16", "bf16"):
        run, _ = toy_run(tmp_path / precision, ONE, **options, mixed_precision=precision)
        predict = run.model.family.predict

        def overflowing(denoiser, latents, *rest, predict=predict):
            prediction = predict(denoiser, latents, *rest)
            return prediction + 1e-6 * (factors @ factors.T).float().reshape(1, 1, 1, 1)

        monkeypatch.setattr(run.model.family, "predict", overflowing)
        if precision == "bf16":
            run_training(run)
        else:
            with pytest.raises(DivergedError, match=r"(?s)fp16 overflows.*in bf16.*set mixed_precision to bf16"):
                run_training(run)


def test_a_base_model_that_is_not_finite_is_reported(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=9)
    run.model.denoiser.register_buffer("packed_scale", torch.tensor([1.0, float("inf")]))
    predict = run.model.family.predict
    run.model.family.predict = lambda denoiser, *rest: predict(denoiser, *rest) * denoiser.packed_scale.sum()
    with pytest.raises(DivergedError, match="frozen base model are not finite, packed_scale"):
        run_training(run)


def test_names_of_what_is_not_finite():
    tensors = {
        "nan": torch.tensor([1.0, float("nan")]),
        "infinite": torch.tensor([float("-inf")], dtype=torch.bfloat16),
        "float8": torch.tensor([float("nan")]).to(torch.float8_e4m3fn),
        "largest": torch.tensor([torch.finfo(torch.float32).max, -torch.finfo(torch.float32).max]),
        "bits": torch.tensor([255], dtype=torch.uint8),
        "empty": torch.zeros(0),
        "good8": torch.tensor([448.0]).to(torch.float8_e4m3fn),
    }
    assert non_finite(tensors) == ["nan", "infinite", "float8"]


def test_a_single_number_that_is_not_finite_is_found():
    tensors = {"scale": torch.tensor(torch.nan), "empty": torch.zeros(0), "step": torch.tensor(3), "w": torch.ones(2)}
    assert non_finite(tensors) == ["scale"]


def test_all_processes_end_where_one_holds_weights_that_are_not_finite(tmp_path):
    def work(process_group):
        run, _ = toy_run(tmp_path / str(process_group.rank), ONE, process_group=process_group)
        require_finite(run, "weights", {"w": torch.ones(1)})
        with pytest.raises(DivergedError, match="weights"):
            require_finite(run, "weights", {"w": torch.tensor([torch.nan if process_group.rank else 1.0])})
        return True

    assert in_processes(2, work) == [True, True]


def test_the_rate_that_is_named_is_that_of_the_update_that_spoiled_the_weights(tmp_path):
    """Linear from 0.5 to 0 in 10 steps: the fourth takes 0.5 x 7/10."""
    options = {"max_train_steps": 10, "lr_scheduler": "linear", "lr_end": 0.0}
    run, _ = toy_run(tmp_path, ONE, optimizer=partial(Poisoned, at=4), **options)
    with pytest.raises(DivergedError, match=r"(?s)update of step 4.*lower learning_rate \(it was 0.35 at this step\)"):
        run_training(run)


def test_skips_are_counted_since_the_last_good_step_and_told_as_such():
    skips = Skips()
    first, second = Progress(3), Progress(4)
    skips.note(first, is_skipped=True)
    skips.in_a_row = 1
    skips.note(second, is_skipped=True)
    assert skips.before is first
    skips.in_a_row = 5
    assert (skips.are_too_many, str(skips)) == (True, "5 steps in a row")
    skips.note(Progress(5), is_skipped=False)
    skips.in_a_row = 0
    assert (skips.before, skips.are_too_many, str(skips)) == (None, False, "2 of the last 3 steps")
    for _ in range(48):
        skips.note(Progress(), is_skipped=False)
    assert str(skips) == "1 of the last 50 steps"


def test_weights_that_a_run_starts_from_are_named_as_such(tmp_path):
    run, _ = toy_run(tmp_path, ONE)
    with pytest.raises(DivergedError) as caught:
        require_finite(
            run, "weights", {"a": torch.ones(1), "b": torch.tensor([torch.nan]), "c": torch.tensor(torch.inf)}
        )
    [problem] = caught.value.problems
    share = "2 of 3 tensors, b first"
    assert problem.message == f"the weights that the run starts from are not finite ({share}); {UNTOUCHED}"
    assert (problem.key, problem.fix) == ("resume_from_checkpoint", "choose other ones and start again")


def test_the_fix_names_the_newest_checkpoint_that_has_shown_a_finite_loss(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=2, checkpoint_step_interval=1)
    run_training(run)
    run.skips.last_update = 2

    def fix() -> str:
        with pytest.raises(DivergedError) as caught:
            require_finite(run, "weights", {"w": torch.tensor(torch.nan)})
        return caught.value.problems[0].fix

    lower = "lower learning_rate (it was 0.5 at this step) and start again"
    assert fix() == f"{lower} with resume_from_checkpoint=checkpoint-1"
    run.session.checkpoints.is_settled = True
    assert fix() == f"{lower}: the run continues from checkpoint-2"
    run.session.checkpoints.is_settled = False
    shutil.rmtree(tmp_path / "output/checkpoint-1")
    assert fix() == f"{lower} with resume_from_checkpoint= (empty)"
    shutil.rmtree(tmp_path / "output/checkpoint-2")
    assert fix() == lower


def test_where_nothing_shows_the_reason_the_rate_and_the_clipping_are_named(tmp_path):
    """What is trained cannot be taken off to see whether it is the reason, as with all weights."""
    run, _ = toy_run(tmp_path, ONE, spoiled=range(5), max_train_steps=9, max_grad_norm=1.0)
    run.model.adapter.can_be_disabled = False
    with pytest.raises(DivergedError) as caught:
        run_training(run)
    [problem] = caught.value.problems
    assert problem.message == (
        f"loss or gradients were not finite for 5 steps in a row, up to step 5; {UNTOUCHED}. The reason is not known. "
        'Samples of the last one: toys/a "caption of a"'
    )
    assert problem.fix == "lower learning_rate (0.5) or max_grad_norm and start again"


def test_a_message_names_four_samples_at_most(tmp_path):
    images = {name: (1.0, 3.0) for name in "abcdef"}
    run, _ = toy_run(tmp_path, images, spoiled=range(5), train_batch_size=6, max_train_steps=9)
    with pytest.raises(DivergedError) as caught:
        run_training(run)
    named = re.findall(r'toys/(\w) "caption of (\w)"', caught.value.problems[0].message)
    assert len({path for path, _ in named}) == len(named) == 4
    assert all(path == caption for path, caption in named)


def test_averages_and_states_that_are_not_finite_are_named_and_not_saved(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=1, use_ema=True)
    run.model.ema.averages["weight"][0] = torch.nan
    with pytest.raises(DivergedError, match=r"averages of the weights are not finite after the update of step 1 "):
        run_training(run)
    assert saved(recorder) == []


def test_a_checkpoint_that_was_loaded_is_not_settled_before_a_finite_step(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=1)
    run_training(run)
    again, _ = toy_run(tmp_path, ONE, max_train_steps=3)
    assert again.session.checkpoints.is_settled
    load_checkpoint(again, tmp_path / "output/checkpoint-1")
    assert not again.session.checkpoints.is_settled
    again.max_train_steps = 2
    run_training(again)
    assert not again.session.checkpoints.is_settled  # the one of step 2 is new


@pytest.mark.parametrize(
    ("precision", "end", "fix"),
    [
        ("no_change", "weight first", "fetch the model's files again"),
        ("int8-quanto", "weight first (int8-quanto)", "set base_model_precision to no_change"),
    ],
)
def test_a_base_that_is_not_finite_is_fetched_again_or_not_packed(precision: str, end: str, fix: str) -> None:
    base = nn.Linear(2, 1)
    with torch.no_grad():
        base.weight[0, 1] = torch.nan
    [(cause, key, proposal)] = _bad_base(SimpleNamespace(trainable=[], denoiser=base), precision)
    assert cause == f"1 tensors of the frozen base model are not finite, {end}"
    assert (key, proposal) == ("base_model_precision", fix)
    assert not list(_bad_base(SimpleNamespace(trainable=[base.weight], denoiser=base), precision))
