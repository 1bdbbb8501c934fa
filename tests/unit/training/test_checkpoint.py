"""Which checkpoints stay, which one a run goes on from, and what is in one."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner import storage
from simpletuner.distributed.process_group import ProcessGroup
from simpletuner.errors import ConfigError, DataError
from simpletuner.reporting.events import CheckpointSaved, Notice
from simpletuner.training.build import checkpoint_plan
from simpletuner.training.checkpoint import (
    Checkpoints,
    checkpoint_content,
    load_checkpoint,
    read_state,
    write_checkpoint,
)
from simpletuner.training.identity import refuse_changes
from simpletuner.training.loop import run_training
from simpletuner.training.run_history import RunHistory
from simpletuner.training.start import _has_later
from tests.toy import load_toy, toy_run, weights_of

ONE = {"a": (1.0, 3.0)}


def folder_of(output: Path, name: str, step: int | None = None) -> Path:
    """A whole folder of that name, which says the step of its name unless another one is given."""
    if step is None:
        step = int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdecimal() else 0
    with storage.commit_dir(output / name, {"global_step": step}) as folder:
        storage.write_bytes(folder / "weights", b"some weights")
    return output / name


def damage(path: Path) -> None:
    (path / "weights").write_bytes(b"SOME weights")


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if not path.name.startswith("."))


@pytest.mark.parametrize(("limit", "kept"), [(3, [3, 4, 5]), (1, [5]), (0, [1, 2, 3, 4, 5]), (5, [1, 2, 3, 4, 5])])
def test_the_last_ones_are_kept(tmp_path, limit, kept):
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=5, checkpoint_step_interval=1, checkpoints_total_limit=limit)
    run_training(run)
    run.session.checkpoints.settle()  # as the end of a run does, once the last weights have shown a finite output
    assert [event.step for event in recorder.of(CheckpointSaved)] == [1, 2, 3, 4, 5]
    assert names(tmp_path / "output") == [f"checkpoint-{step}" for step in kept]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint_step_interval": 500}, "every 500 steps, at the end; the last 5 are kept"),
        (
            {"checkpoint_epoch_interval": 0.5, "checkpoints_total_limit": 0},
            "every 0.5 epochs, at the end; all are kept",
        ),
        ({}, "at the end; the last 5 are kept"),
    ],
)
def test_the_start_of_the_log_says_when_checkpoints_are_saved(tmp_path, options, words):
    written = {"checkpoint_step_interval": 0, "checkpoints_total_limit": 5} | options
    assert checkpoint_plan(load_toy(tmp_path).config.with_values(written).checkpoint) == words


def test_what_is_damaged_or_has_another_name_is_not_counted_and_not_removed(tmp_path):
    others = ["checkpoint-1 (copy)", "my-checkpoint-1", "checkpoint-", "checkpoint-best"]
    for name in ["checkpoint-1", "checkpoint-2", "checkpoint-3", "checkpoint-10", *others]:
        folder_of(tmp_path, name)
    damage(tmp_path / "checkpoint-2")
    notices = Checkpoints(tmp_path, 2).rotate(keep=tmp_path / "checkpoint-10")
    assert [notice.text for notice in notices] == ["checkpoint-1 removed: checkpoints_total_limit is 2"]
    assert names(tmp_path) == sorted(["checkpoint-2", "checkpoint-3", "checkpoint-10", *others])


def test_the_checkpoint_just_written_stays_even_if_others_have_higher_steps(tmp_path):
    for step in (3, 7, 9):
        folder_of(tmp_path, f"checkpoint-{step}")
    Checkpoints(tmp_path, 1).rotate(keep=tmp_path / "checkpoint-3")
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-9"]


def test_the_newest_is_the_highest_step_that_is_whole(tmp_path):
    checkpoints = Checkpoints(tmp_path, None)
    assert checkpoints.newest() is None
    for step in (2, 9, 10):
        folder_of(tmp_path, f"checkpoint-{step}")
    (tmp_path / "checkpoint-99").write_text("a file")
    assert [path.name for path in checkpoints.found()] == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert checkpoints.newest() == tmp_path / "checkpoint-10"
    damage(tmp_path / "checkpoint-10")
    assert checkpoints.newest() == tmp_path / "checkpoint-9"


def test_a_run_goes_on_from_the_last_whole_one_and_says_what_it_renamed(tmp_path):
    for step in (9, 10):
        folder_of(tmp_path, f"checkpoint-{step}")
    damage(tmp_path / "checkpoint-10")
    path, notices = Checkpoints(tmp_path, None).choose("latest")
    assert path == tmp_path / "checkpoint-9"
    assert len(notices) == 1
    assert "checkpoint-10 is damaged" in notices[0]
    assert names(tmp_path) == ["checkpoint-9", "damaged-checkpoint-10"]


@pytest.mark.parametrize(("best", "chosen"), [(12, "checkpoint-best"), (10, "checkpoint-10"), (3, "checkpoint-10")])
def test_the_best_checkpoint_takes_part_by_its_step(tmp_path, best, chosen):
    folder_of(tmp_path, "checkpoint-10", 10)
    folder_of(tmp_path, "checkpoint-best", best)
    assert Checkpoints(tmp_path, None).choose("latest") == (tmp_path / chosen, [])


def test_where_all_are_damaged_the_run_does_not_start_again(tmp_path):
    damage(folder_of(tmp_path, "checkpoint-4"))
    with pytest.raises(ConfigError, match=r"every checkpoint in .* is damaged"):
        Checkpoints(tmp_path, None).choose("latest")


def test_a_named_one_is_taken_and_a_damaged_or_missing_one_refused(tmp_path):
    folder_of(tmp_path, "checkpoint-3")
    folder_of(tmp_path, "checkpoint-4")
    damage(tmp_path / "checkpoint-4")
    checkpoints = Checkpoints(tmp_path, None)
    assert checkpoints.choose("checkpoint-3") == (tmp_path / "checkpoint-3", [])
    assert checkpoints.choose(None) == (None, [])
    with pytest.raises(ConfigError, match="checkpoint-4 is damaged"):
        checkpoints.choose("checkpoint-4")
    with pytest.raises(ConfigError, match="there is no checkpoint checkpoint-5"):
        checkpoints.choose("checkpoint-5")


def test_the_checkpoint_of_a_step_that_is_there_already_stays_as_it_is(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=1)
    run_training(run)
    saved = tmp_path / "output/checkpoint-1"
    inode = saved.stat().st_ino
    with torch.no_grad():
        run.model.denoiser.weight.fill_(9.0)
    run.session.checkpoints.save(run)
    assert saved.stat().st_ino == inode
    (saved / "toy.safetensors").write_bytes(b"damaged")
    run.session.checkpoints.save(run)
    assert load_file(saved / "toy.safetensors")["weight"].tolist() == [9, 9]


def test_the_best_one_links_the_files_of_its_step_and_notes_its_loss(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=1)
    run_training(run)
    best = run.session.checkpoints.save_best(run, 0.25)
    file = "toy.safetensors"
    assert (best / file).stat().st_ino == (tmp_path / "output/checkpoint-1" / file).stat().st_ino
    metadata = dict(storage.read_manifest(best).metadata)
    assert metadata.pop("run_history")["run"] == run.session.checkpoints.history.run_id
    assert metadata == {"global_step": 1, "eval_loss": 0.25}
    assert run.session.checkpoints.best_evaluation() == (1, 0.25)
    run.progress.global_step = 2
    with torch.no_grad():
        run.model.denoiser.weight.fill_(9.0)
    run.session.checkpoints.save_best(run, 0.125)
    assert load_file(best / file)["weight"].tolist() == [9, 9]
    assert load_file(tmp_path / "output/checkpoint-1" / file)["weight"].tolist() == [0.5, 1.5]


def test_no_process_goes_on_before_the_best_one_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = toy_run(tmp_path, ONE, max_train_steps=1)
    run_training(run)
    best, seen = tmp_path / "output/checkpoint-best", []
    monkeypatch.setattr(ProcessGroup, "barrier", lambda self: seen.append(best.is_dir()))
    run.session.checkpoints.save_best(run, 0.25)
    assert seen == [True]


def test_a_checkpoint_holds_all_that_a_run_stands_on(tmp_path):
    momentum = partial(torch.optim.SGD, momentum=0.9)
    run, _ = toy_run(tmp_path, ONE, max_train_steps=1, optimizer=momentum, use_ema=True)
    run.progress.eval_losses = {0: 5.0, 1: float("nan")}
    run_training(run)
    saved = tmp_path / "output/checkpoint-1"
    assert {path.name for path in saved.iterdir()} == {
        *("manifest.json", "toy.safetensors", "optimizer.safetensors", "ema.safetensors", "ema"),
        *("training_state.json", "config.json"),
    }
    assert load_file(saved / "optimizer.safetensors")["weight//momentum_buffer"].tolist() == [-1, -3]
    state = json.loads((saved / "training_state.json").read_text())
    assert state["state"] == {"global_step": 1, "epoch": 1, "position": 0}
    assert state["eval_losses"] == {"0": 5.0, "1": None}
    assert json.loads((saved / "config.json").read_text())["max_train_steps"] == 1
    assert storage.verify_dir(saved) == []
    assert storage.read_manifest(saved).metadata["global_step"] == 1


def test_eval_losses_come_with_a_checkpoint_of_the_run_itself_and_not_with_another_s(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=1)
    run.progress.eval_losses = {0: 5.0}
    run_training(run)
    for is_own, known in ((True, {0: 5.0, 1: 3.0}), (False, {1: 3.0})):
        again, _ = toy_run(tmp_path, ONE, max_train_steps=2)
        again.progress.eval_losses = {1: 3.0}
        load_checkpoint(again, tmp_path / "output/checkpoint-1", is_own)
        assert again.progress.eval_losses == known
        assert weights_of(again) == [0.5, 1.5]


def test_an_average_that_is_new_starts_from_the_weights_of_the_checkpoint(tmp_path):
    run_training(toy_run(tmp_path, ONE, max_train_steps=1)[0])
    run, recorder = toy_run(tmp_path, ONE, max_train_steps=1, use_ema=True, ema_decay=0.75)
    load_checkpoint(run, tmp_path / "output/checkpoint-1")
    assert weights_of(run) == [0.5, 1.5]
    assert run.model.ema.state_dict()["weight"].tolist() == [0.5, 1.5]
    assert run.model.ema.decay == 0.75
    assert any("has no EMA" in notice.text for notice in recorder.of(Notice))


def test_another_learning_rate_is_reported_and_another_optimizer_refused(tmp_path):
    run_training(toy_run(tmp_path, ONE, max_train_steps=1)[0])
    saved = tmp_path / "output/checkpoint-1"
    run, recorder = toy_run(tmp_path, ONE, learning_rate=0.25)
    load_checkpoint(run, saved)
    assert any("learning_rate" in notice.text and "0.25" in notice.text for notice in recorder.of(Notice))
    with pytest.raises(ConfigError, match="optimizer"):
        load_checkpoint(toy_run(tmp_path, ONE, optimizer_name="lion")[0], saved)


def test_the_checkpoint_of_another_optimizer_is_refused_by_its_setting(tmp_path):
    run_training(toy_run(tmp_path, ONE, max_train_steps=1)[0])
    saved = tmp_path / "output/checkpoint-1"
    fixed = read_state(saved)["identity"]["fixed"]
    refuse_changes(fixed, fixed, saved)
    with pytest.raises(ConfigError, match="optimizer adamw → lion") as caught:
        refuse_changes(fixed, fixed | {"optimizer": "lion"}, saved)
    assert [problem.key for problem in caught.value.problems] == ["optimizer"]
    with pytest.raises(ConfigError, match="2 → 3"):
        refuse_changes(fixed, fixed | {"parameters": {"weight": [3]}}, saved)


def test_a_run_owns_what_it_wrote_itself_up_to_where_it_went_back(tmp_path):
    """Steps 1 to 5, then back to 3 and on to 4 and 5: the old 4 and 5 are of a branch that was left."""
    first = RunHistory.new()
    back = first.branched(3)
    assert [back.owns(first.mark, step) for step in (1, 3, 4, 5)] == [True, True, False, False]
    assert [back.owns(back.mark, step) for step in (3, 4, 5)] == [True, True, True]
    again = back.branched(2)
    assert [again.owns(mark, 3) for mark in (first.mark, back.mark, again.mark)] == [False, False, True]
    assert again.owns(first.mark, 2)
    assert not RunHistory.new().owns(first.mark, 1)
    assert not first.owns(None, 1)
    assert RunHistory.new(adopts_unmarked=True).owns(None, 1)


def test_the_checkpoint_of_another_run_s_step_is_not_this_run_s(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=1)
    run_training(run)
    assert run.session.checkpoints.has(1)
    assert not Checkpoints(tmp_path / "output", None, RunHistory.new()).has(1)


def test_a_state_that_lacks_a_part_is_refused(tmp_path):
    run_training(toy_run(tmp_path, ONE, max_train_steps=1)[0])
    file = tmp_path / "output/checkpoint-1/training_state.json"
    whole = json.loads(file.read_text())
    for key in ("state", "loss_scale", "identity", "optimizer", "eval_losses"):
        file.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(DataError, match="cannot be read"):
            read_state(file.parent)


def test_a_run_goes_back_where_anything_of_it_is_of_a_later_step(tmp_path):
    for step in (2, 3):
        folder_of(tmp_path, f"checkpoint-{step}", step)
    checkpoints = Checkpoints(tmp_path, None)
    assert [_has_later(checkpoints, step) for step in (1, 2, 3)] == [True, True, False]
    folder_of(tmp_path, "checkpoint-best", 4)
    assert _has_later(checkpoints, 3)
    folder_of(tmp_path, "pipeline", 5)  # the final weights
    assert [_has_later(checkpoints, step) for step in (4, 5)] == [True, False]


def test_a_new_average_has_the_interval_that_is_written(tmp_path):
    run_training(toy_run(tmp_path, ONE, max_train_steps=1)[0])
    run, _ = toy_run(tmp_path, ONE, use_ema=True, ema_update_interval=3)
    load_checkpoint(run, tmp_path / "output/checkpoint-1")
    assert run.model.ema.update_interval == 3


class Averaging(torch.optim.SGD):
    """Its weights are averages outside of training: here twice the trained ones."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr=lr)
        self.param_groups[0]["train_mode"] = True

    @torch.no_grad()
    def eval(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.mul_(2)


def test_a_file_of_averaged_weights_comes_with_the_trained_ones_from_which_a_run_goes_on(tmp_path):
    run, _ = toy_run(tmp_path, ONE, optimizer=Averaging, max_train_steps=1)
    run_training(run)
    saved = tmp_path / "output/checkpoint-1"
    assert load_file(saved / "toy.safetensors")["weight"].tolist() == [1, 3]
    assert load_file(saved / "trainable.safetensors")["weight"].tolist() == weights_of(run) == [0.5, 1.5]
    again, _ = toy_run(tmp_path, ONE, optimizer=Averaging)
    load_checkpoint(again, saved)
    assert weights_of(again) == [0.5, 1.5]


def test_another_run_s_checkpoints_are_listed_with_their_best_one_and_are_no_choice(tmp_path):
    for step in (2, 1):
        folder_of(tmp_path, f"checkpoint-{step}", step)
    folder_of(tmp_path, "checkpoint-best", 1)
    checkpoints = Checkpoints(tmp_path, None, RunHistory.new())
    assert [path.name for path in checkpoints.others()] == ["checkpoint-1", "checkpoint-2", "checkpoint-best"]
    assert (checkpoints.found(), checkpoints.best(), checkpoints.best_evaluation()) == ([], None, None)
    with pytest.raises(ConfigError, match="other runs only: checkpoint-1, checkpoint-2, checkpoint-best"):
        checkpoints.choose("latest")
    assert checkpoints.choose("") == (None, [])
    own = Checkpoints(tmp_path, None)
    assert (own.others(), own.best()) == ([], tmp_path / "checkpoint-best")


def test_a_name_means_the_output_folder_first_and_a_path_that_path(tmp_path, monkeypatch):
    for folder in ("output", "here"):
        (tmp_path / folder).mkdir()
        folder_of(tmp_path / folder, "checkpoint-1")
    folder_of(tmp_path / "here", "checkpoint-2")
    monkeypatch.chdir(tmp_path / "here")
    checkpoints = Checkpoints(tmp_path / "output", None)
    assert checkpoints.choose("checkpoint-1")[0] == tmp_path / "output/checkpoint-1"
    assert checkpoints.choose("checkpoint-2")[0] == Path("checkpoint-2")
    assert checkpoints.choose("../here/checkpoint-1")[0] == Path("../here/checkpoint-1")
    with pytest.raises(ConfigError) as caught:
        checkpoints.choose("checkpoint-9")
    [problem] = caught.value.problems
    assert (problem.key, problem.allowed) == ("resume_from_checkpoint", "latest, or one of: checkpoint-1")


def test_a_checkpoint_of_another_run_makes_way_for_the_one_of_this_step(tmp_path):
    """Its best one too."""
    output = tmp_path / "output"
    output.mkdir()
    for name in ("checkpoint-1", "checkpoint-best"):
        folder_of(output, name, 1)
    options = {"eval_steps_interval": 1, "losses": [5, 4]}
    run, _ = toy_run(tmp_path, ONE, max_train_steps=1, **options)
    run.session.checkpoints = Checkpoints(output, None, RunHistory.new())
    run_training(run)
    assert load_file(output / "checkpoint-1/toy.safetensors")["weight"].tolist() == [0.5, 1.5]
    assert run.session.checkpoints.best_evaluation() == (1, 4.0)
    aside = sorted(path.parent.name for path in output.glob("earlier-runs/*/*/weights"))
    assert aside == ["checkpoint-1", "checkpoint-best"]


def test_the_oldest_of_what_a_kill_has_left_goes_with_the_first_good_step(tmp_path):
    for step in (1, 2, 3):
        folder_of(tmp_path, f"checkpoint-{step}", step)
    checkpoints = Checkpoints(tmp_path, 1)
    assert checkpoints.settle() == []
    checkpoints.is_settled = False
    assert [notice.text.split()[0] for notice in checkpoints.settle()] == ["checkpoint-1", "checkpoint-2"]
    assert checkpoints.is_settled
    assert names(tmp_path) == ["checkpoint-3"]


def test_a_copy_under_another_step_is_neither_resumed_nor_counted(tmp_path):
    """As the newest by its name it would be resumed at each start, and push the real ones out of the limit."""
    for step in (2, 4):
        folder_of(tmp_path, f"checkpoint-{step}")
    folder_of(tmp_path, "checkpoint-40", 2)
    checkpoints = Checkpoints(tmp_path, 1)
    assert checkpoints.choose("latest") == (tmp_path / "checkpoint-4", [])
    with pytest.raises(ConfigError, match="checkpoint-40 holds step 2: it was renamed, or is a copy"):
        checkpoints.choose("checkpoint-40")
    checkpoints.rotate(keep=tmp_path / "checkpoint-4")
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-40"]


def test_a_checkpoint_that_is_a_link_is_rotated_without_what_it_leads_to(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "output").mkdir()
    for step in (2, 4):
        folder_of(tmp_path / "disk", f"checkpoint-{step}")
        (tmp_path / f"output/checkpoint-{step}").symlink_to(tmp_path / f"disk/checkpoint-{step}")
    checkpoints = Checkpoints(tmp_path / "output", 1)
    assert checkpoints.choose("latest") == (tmp_path / "output/checkpoint-4", [])
    [notice] = checkpoints.rotate(keep=tmp_path / "output/checkpoint-4")
    assert notice.text == "checkpoint-2 removed: checkpoints_total_limit is 1"
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == ["checkpoint-4"]
    assert names(tmp_path / "disk") == ["checkpoint-2", "checkpoint-4"]


def test_a_file_that_has_the_name_of_a_checkpoint_is_moved_and_not_lost(tmp_path):
    run, _ = toy_run(tmp_path, ONE, max_train_steps=1)
    (tmp_path / "output/checkpoint-1").write_text("the user's")
    run_training(run)
    assert run.session.checkpoints.has(1)
    assert [path.read_text() for path in tmp_path.glob("output/earlier-runs/*/checkpoint-1")] == ["the user's"]


def test_counters_of_groups_are_kept_though_an_engine_keeps_the_other_states(tmp_path, monkeypatch):
    run, _ = toy_run(tmp_path, ONE)
    run.model.optimizer.param_groups[0]["k"] = 5  # as schedule-free optimizers count their steps
    state: dict = {"class": "AdamW", "states": {}, "groups": [{}]}
    monkeypatch.setattr(run.model.placement, "own_state", lambda: ({"weight//exp_avg": torch.zeros(2)}, state))
    content = checkpoint_content(run)
    assert content.plain["groups"] == [{"k": 5}]
    assert list(content.optimizer) == ["weight//exp_avg"]


def test_the_average_is_saved_with_the_weights_that_do_not_train(tmp_path):
    run, _ = toy_run(tmp_path, ONE, use_ema=True)
    weights = {"weight": torch.tensor([1.0, 2.0]), "frozen": torch.tensor([3.0])}
    write_checkpoint(run, tmp_path, replace(checkpoint_content(run), weights=weights))
    saved = load_file(tmp_path / "ema" / run.model.adapter.file_name)
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {"weight": [0, 0], "frozen": [3]}
