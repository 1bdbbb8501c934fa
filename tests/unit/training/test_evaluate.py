"""What follows from an eval loss: what is reported and kept, and what a resume makes of it (`tests/toy.py`)."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from simpletuner import storage
from simpletuner.distributed.process_group import ProcessGroup
from simpletuner.reporting.events import CheckpointSaved, EvalDone, Notice
from simpletuner.training.evaluate import (
    evaluate,
    evaluate_anew,
    is_comparable,
    keeps_best,
    recorded_losses,
    reference_result,
    restore_best,
)
from simpletuner.training.evaluation import EvalResult
from simpletuner.training.loop import run_training
from tests.toy import toy_run

ONE = {"a": (1.0, 3.0)}


class Judging:
    """Of two datasets: the first weight, and twice of it; None once it is asked to stop."""

    identity: Any = {"datasets": ["one", "two"]}

    def __init__(self, stops_at: float = math.inf) -> None:
        self.count, self.stops_at = 0, stops_at

    def run(self, denoiser) -> EvalResult | None:
        self.count += 1
        loss = float(denoiser.weight[0].detach())
        if loss >= self.stops_at:
            return None
        return EvalResult({"one": loss, "two": 2 * loss}, 1.5 * loss, [(0.25, loss), (0.75, 2 * loss)])


def texts(recorder) -> list[str]:
    return [notice.text for notice in recorder.of(Notice)]


@pytest.mark.parametrize("is_pooled", [False, True])
def test_an_evaluation_reports_each_dataset_unless_they_are_pooled_and_the_base_beside_it(tmp_path, is_pooled):
    """The weights are 0.5, then 0.75; the base is the untrained network, judged once in each process."""
    options = {"eval_steps_interval": 1, "eval_dataset_pooling": is_pooled}
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=2, **options)
    run.evaluator, run.progress.global_step = Judging(), 1
    with torch.no_grad():
        run.model.denoiser.weight.copy_(torch.tensor([0.5, 1.5]))
    run_training(run)
    first, second = recorder.of(EvalDone)
    assert [(event.step, event.pooled) for event in (first, second)] == [(1, 0.75), (2, 1.125)]
    assert first.losses == ({} if is_pooled else {"one": 0.5, "two": 1.0})
    assert second.per_quantile == ((0.25, 0.75), (0.75, 1.5))
    assert [event.reference for event in (first, second)] == [0, 0]
    assert second.reference_per_quantile == ((0.25, 0), (0.75, 0))
    assert run.evaluator.count == 3


def test_weights_that_cannot_be_taken_off_are_their_own_reference_before_the_first_step_only(tmp_path):
    for step, reference in ((0, 1.5), (1, None)):
        run, _ = toy_run(tmp_path / str(step), ONE)
        run.evaluator, run.progress.global_step, run.model.adapter.can_be_disabled = Judging(), step, False
        found = reference_result(run, EvalResult({}, 1.5, []))
        assert (found.pooled if found else None) == reference
        assert run.evaluator.count == 0


def test_half_an_evaluation_is_none_and_says_so(tmp_path):
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=1, eval_steps_interval=1)
    run.evaluator = Judging(stops_at=0.5)
    run_training(run)
    assert [event.step for event in recorder.of(EvalDone)] == [0]
    assert texts(recorder) == ["no eval loss at step 1: the run is asked to stop"]
    assert run.progress.eval_losses == {0: 0}


def test_all_processes_keep_the_loss_of_the_main_one(tmp_path):
    """The last bit of another process must not decide for it alone when the run ends."""
    run, _ = toy_run(tmp_path, ONE, losses=[5, 4], max_train_steps=1, eval_steps_interval=1)

    class Other(type(run.session.process_group)):
        def from_main(self, value):
            return value + 1e-9

    run.session.process_group = Other()
    run_training(run)
    assert run.progress.eval_losses == {0: 5 + 1e-9, 1: 4 + 1e-9}


def test_the_end_that_patience_brings_is_told_with_its_numbers(tmp_path):
    options = {"eval_steps_interval": 1, "early_stopping_patience": 2}
    run, recorder = toy_run(tmp_path, ONE, losses=[5, 4, 4.5, 4.25], max_train_steps=9, **options)
    run_training(run)
    assert texts(recorder) == [
        "the run ends at step 3: 2 evaluations in a row brought no eval loss below 4.0000 of step 1 "
        "(early_stopping_patience)"
    ]
    written = json.loads((tmp_path / "output/eval_losses.json").read_text())
    assert written["losses"] == {"0": 5, "1": 4, "2": 4.5, "3": 4.25}
    assert written["run"] == run.session.checkpoints.history.run_id


@pytest.mark.parametrize(("written", "kept"), [({}, True), ({"checkpoint_keep_best": False}, False)])
def test_the_best_is_kept_unless_somebody_wrote_otherwise(tmp_path, written, kept):
    run, recorder = toy_run(tmp_path, ONE, losses=[5, 4, 6], max_train_steps=2, eval_steps_interval=1, **written)
    assert keeps_best(run) is kept
    run_training(run)
    assert [event.step for event in recorder.of(CheckpointSaved) if event.eval_loss is not None] == [1] * kept
    run.evaluator = None
    assert not keeps_best(run)


def test_metrics_give_the_last_loss_of_each_step(tmp_path):
    records = [
        {"event": "eval_done", "step": 1, "pooled": 5.0},
        {"event": "eval_done", "step": 2, "pooled": "nan"},
        {"event": "eval_done", "step": 1, "pooled": 4},
        {"event": "step_done", "step": 3, "pooled": 1.0},
        {"event": "eval_done", "pooled": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert recorded_losses(tmp_path / "metrics.jsonl") == {"1": 4.0, "2": None}


# ---- the record and the best checkpoint ----------------------------------------------------------------------------


def trained(folder, **options):
    """A run of three steps, of which each is saved."""
    options = {"checkpoint_step_interval": 1, "eval_steps_interval": 1, "checkpoints_total_limit": 0} | options
    run, recorder = toy_run(folder, ONE, losses=[9], max_train_steps=3, **options)
    evaluator, run.evaluator = run.evaluator, None
    run_training(run)
    run.evaluator = evaluator
    recorder.events.clear()
    return run, recorder


def best_of(run) -> tuple[int, float] | None:
    return run.session.checkpoints.best_evaluation()


def test_a_best_checkpoint_that_the_record_lacks_is_added_to_it(tmp_path):
    run, recorder = trained(tmp_path)
    run.session.checkpoints.link_best(2, 0.5)
    run.progress.eval_losses = {1: 0.75}
    restore_best(run)
    assert run.progress.eval_losses == {1: 0.75, 2: 0.5}
    assert json.loads((tmp_path / "output/eval_losses.json").read_text())["losses"] == {"1": 0.75, "2": 0.5}
    assert best_of(run) == (2, 0.5)
    assert texts(recorder) == []


def test_a_best_checkpoint_of_a_later_step_or_of_a_known_one_adds_nothing(tmp_path):
    run, _ = trained(tmp_path)
    run.session.checkpoints.link_best(3, 0.5)
    run.progress.global_step, run.progress.eval_losses = 2, {}
    restore_best(run)
    assert run.progress.eval_losses == {}
    run.progress.global_step, run.progress.eval_losses = 3, {3: 0.25}
    restore_best(run)
    assert run.progress.eval_losses == {3: 0.25}
    assert not (tmp_path / "output/eval_losses.json").exists()


def test_a_best_checkpoint_that_is_lost_is_the_numbered_one_of_its_step(tmp_path):
    run, recorder = trained(tmp_path)
    run.progress.eval_losses = {0: 0.1, 1: 0.75, 2: 0.25, 3: 0.5}
    restore_best(run)
    assert best_of(run) == (2, 0.25)
    assert texts(recorder) == ["checkpoint-best is checkpoint-2, eval loss 0.2500"]
    run.progress.global_step, run.progress.eval_losses = 1, {0: 0.1, 1: 0.75}  # it went back
    restore_best(run)
    assert best_of(run) == (1, 0.75)
    run.progress.eval_losses = {0: 0.1, 7: 0.5}  # there is none of this step
    restore_best(run)
    assert best_of(run) == (1, 0.75)


def test_no_best_checkpoint_is_restored_where_none_is_kept(tmp_path):
    run, _ = trained(tmp_path, checkpoint_keep_best=False)
    run.progress.eval_losses = {2: 0.25}
    restore_best(run)
    assert best_of(run) is None


def test_losses_and_the_best_of_other_eval_images_do_not_count(tmp_path):
    options = {"checkpoint_step_interval": 1, "eval_steps_interval": 1, "max_train_steps": 2}
    run, recorder = toy_run(tmp_path, ONE, losses=[9, 3, 4], **options)
    run_training(run)
    output, newest = tmp_path / "output", tmp_path / "output/checkpoint-2"
    assert is_comparable(run, newest)
    run.evaluator.identity = {"datasets": ["others"]}
    assert not is_comparable(run, newest)
    assert not is_comparable(run, output / "checkpoint-best")
    run.progress.eval_losses = {}
    restore_best(run)
    assert run.progress.eval_losses == {}
    evaluate_anew(run, output / "checkpoint-best")
    assert best_of(run) == (1, 3)  # the run has resumed from it
    evaluate_anew(run, newest)
    assert best_of(run) is None
    assert [path.parent.name for path in output.glob("earlier-runs/*/checkpoint-best/toy.safetensors")] == [
        "checkpoint-best"
    ]
    assert json.loads((output / "eval_losses.json").read_text())["losses"] == {}
    assert "start anew; the best of before is now in " in texts(recorder)[-1]
    run.evaluator = None
    assert is_comparable(run, newest)


class Second(ProcessGroup):
    """A process to which the main one says something else than it has found itself."""

    def from_main(self, value: Any) -> Any:
        return 7.0


def test_an_eval_loss_is_the_main_process_s_in_all_of_them(tmp_path):
    """By it each of them decides on its own whether the run ends."""
    run, _ = toy_run(tmp_path, ONE, losses=[3, 4], eval_steps_interval=1)
    run.progress.global_step, run.session.process_group = 1, Second()
    evaluate(run)
    assert run.progress.eval_losses == {1: 7.0}


def test_an_evaluation_computes_in_the_number_format_of_training(tmp_path):
    run, _ = toy_run(tmp_path, ONE, mixed_precision="bf16", eval_steps_interval=1)
    seen: list[Any] = []

    class Noting(Judging):
        def run(self, denoiser) -> EvalResult | None:
            seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
            return super().run(denoiser)

    run.evaluator = Noting()
    evaluate(run)
    assert seen == [torch.bfloat16]


def test_the_best_checkpoint_of_a_skipped_step_is_of_the_step_before(tmp_path):
    """The weights that were judged are those of the first step."""
    options = {"eval_steps_interval": 1, "max_train_steps": 2}
    run, _ = toy_run(tmp_path, ONE, spoiled=[1], losses=[3.0, 2.0, 1.0], **options)
    run_training(run)
    metadata = storage.read_manifest(tmp_path / "output" / "checkpoint-best").metadata
    assert (metadata["global_step"], metadata["eval_loss"]) == (1, 1.0)
