"""Whose a file is: ids and branches by hand, folders of several runs, and moves over which a process dies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from simpletuner import storage
from simpletuner.errors import DataError
from simpletuner.training.checkpoint import Checkpoints
from simpletuner.training.earlier_runs import delete_command, earlier_size, finish_move, move_earlier
from simpletuner.training.run_files import belongings
from simpletuner.training.run_history import (
    Branch,
    FolderGuard,
    Mark,
    RunHistory,
    find_run_history,
    read_run_history,
)

# Step 8 on branch a, back to 2, step 9 on b, back to 5: now on c.
HISTORY = RunHistory("run", (Branch("a", 0), Branch("b", 2), Branch("c", 5)))


@pytest.mark.parametrize(
    ("mark", "step", "is_own"),
    [
        (Mark("run", "a"), 2, True),
        (Mark("run", "a"), 3, False),
        (Mark("run", "b"), 3, True),
        (Mark("run", "b"), 5, True),
        (Mark("run", "b"), 6, False),
        (Mark("run", "c"), 100, True),
        (Mark("run", "d"), 1, False),
        (Mark("other", "a"), 1, False),
        (None, 1, False),
    ],
)
def test_a_file_is_the_run_s_if_the_run_was_on_its_branch_at_its_step(mark: Mark | None, step: int, is_own: bool):
    assert HISTORY.owns(mark, step) == is_own


def test_files_without_a_mark_are_of_the_first_branch_where_they_are_adopted():
    adopting = RunHistory("run", HISTORY.branches, adopts_unmarked=True)
    assert [adopting.owns(None, step) for step in (1, 2, 3, 6)] == [True, True, False, False]


@pytest.mark.parametrize(("step", "kept"), [(7, ["a", "b", "c"]), (5, ["a", "b"]), (4, ["a", "b"]), (1, ["a"])])
def test_going_back_drops_the_branches_that_begin_later(step: int, kept: list[str]):
    *before, new = HISTORY.branched(step).branches
    assert [branch.id for branch in before] == kept
    assert new.after_step == step


def test_a_history_survives_json():
    assert RunHistory.from_json(json.loads(json.dumps(HISTORY.to_json()))) == HISTORY
    for damaged in ({}, [], {"run": "a", "branches": [], "adopts_unmarked": False}, {"run": "a", "branches": [1]}):
        with pytest.raises(ValueError, match="history"):
            RunHistory.from_json(damaged)


def checkpoint(folder: Path, step: int, history: RunHistory | None) -> Path:
    metadata = {"global_step": step, **({"run_history": history.to_json()} if history else {})}
    with storage.commit_dir(folder / f"checkpoint-{step}", metadata) as temporary:
        (temporary / "weights").write_text(f"weights of {step}")
    return folder / f"checkpoint-{step}"


def test_a_copy_of_the_checkpoints_alone_is_the_same_run(tmp_path: Path):
    paths = [checkpoint(tmp_path, 2, RunHistory("run", (Branch("a", 0),))), checkpoint(tmp_path, 6, HISTORY)]
    found, lines = find_run_history(tmp_path, paths)
    assert found == HISTORY
    assert "run run is continued from what checkpoint-6 says" in lines[0]


def test_the_checkpoint_of_the_highest_step_says_the_branches_whatever_the_best_one_is_called(tmp_path: Path):
    """The best was kept before the run went back, so it does not know the branch that came after it."""
    newest = checkpoint(tmp_path, 6, HISTORY)
    best = tmp_path / "checkpoint-best"
    checkpoint(tmp_path, 2, RunHistory("run", (Branch("a", 0),))).rename(best)
    found, _ = find_run_history(tmp_path, [newest, best])
    assert found == HISTORY
    assert Checkpoints(tmp_path, 3, found).choose("latest") == (newest, [])


def test_checkpoints_of_an_earlier_version_are_adopted_and_those_of_several_runs_are_not(tmp_path: Path):
    found, lines = find_run_history(tmp_path, [checkpoint(tmp_path, 2, None)])
    assert found.owns(None, 2)
    assert "adopted as run" in lines[0]
    of_several = [checkpoint(tmp_path, 4, HISTORY), checkpoint(tmp_path, 6, RunHistory.new())]
    found, lines = find_run_history(tmp_path, of_several)
    assert not found.owns(Mark("run", "c"), 4)
    assert not found.owns(None, 2)
    assert lines == []


def used_folder(folder: Path) -> None:
    """A folder with something of each kind that a run writes, and files that are no run's."""
    checkpoint(folder, 2, HISTORY)
    checkpoint(folder, 4, HISTORY)
    with storage.commit_dir(folder / "checkpoint-best", {"global_step": 4}) as temporary:
        (temporary / "weights").write_text("best")
    storage.write_json(folder / "run_history.json", HISTORY.to_json())
    (folder / "metrics.jsonl").write_text('{"event": "run_started"}\n{"event": "step_done", "step": 4}\n')
    for name in ("eval_losses.json", "metrics.csv", "report.html", "wandb_run.json", "loss.png", "before_after.png"):
        (folder / name).write_text(name)
    storage.write_json(folder / "hub_upload.json", {"step": 4})
    for name in ("logs/run/events", "webhooks/1-raw/1-a.json", "benchmarks/base_model/a.png", "ema/weights"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(name)
    (folder / "validation_images/previews").mkdir(parents=True)
    for step in (2, 4):
        (folder / f"validation_images/step_{step}_a_0_8x8.png").write_text(str(step))
        (folder / f"validation_images/previews/step_{step}_a_0_8x8_at_1.png").write_text(str(step))
    for name in ("config.json", "notes.txt", ".lock"):
        (folder / name).write_text("the user's")


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_fresh_start_moves_all_of_a_run_and_nothing_else(tmp_path: Path):
    used_folder(tmp_path)
    before = content(tmp_path)
    new = RunHistory.new()
    line = move_earlier(tmp_path, new, None)
    folder = tmp_path / "earlier-runs" / "1-run"
    assert line is not None
    assert str(folder) in line
    kept = {"config.json", "notes.txt", ".lock"}
    assert content(folder) == {name: data for name, data in before.items() if name not in kept}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "run_history.json", "earlier-runs"}
    assert read_run_history(tmp_path) == new
    assert move_earlier(tmp_path, new, None) is None


def test_going_back_moves_what_lies_after_the_step_and_copies_the_records(tmp_path: Path):
    used_folder(tmp_path)
    move_earlier(tmp_path, HISTORY.branched(2), 2)
    folder = tmp_path / "earlier-runs" / "1-run-after-step-2"
    moved = {"checkpoint-4", "checkpoint-best", "ema", "report.html", "loss.png", "before_after.png", "hub_upload.json"}
    assert {*moved, "wandb_run.json"} <= {path.name for path in folder.iterdir()}
    assert not {path.name for path in tmp_path.iterdir()} & {*moved, "wandb_run.json"}
    assert [path.name for path in (tmp_path / "validation_images").glob("*.png")] == ["step_2_a_0_8x8.png"]
    assert [path.name for path in folder.rglob("step_*_at_1.png")] == ["step_4_a_0_8x8_at_1.png"]
    for name in ("metrics.jsonl", "metrics.csv", "eval_losses.json"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    assert (tmp_path / "checkpoint-2").is_dir()
    assert (tmp_path / "benchmarks").is_dir()


@pytest.mark.parametrize("after_step", [None, 2])
def test_a_move_over_which_the_process_dies_is_finished_by_the_next_start(tmp_path: Path, monkeypatch, after_step):
    """At every single rename: what was there before is there afterwards, in one of the two folders."""
    whole = tmp_path / "whole"
    used_folder(whole)
    total = len(belongings(whole, after_step))
    before = set(content(whole).values())
    real = storage.move
    for count in range(total):
        folder = tmp_path / str(count)
        used_folder(folder)
        left = iter(range(count))

        def move(path: Path, target: Path, left=left) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt
            real(path, target)

        with monkeypatch.context() as patched:
            patched.setattr(storage, "move", move)
            with pytest.raises(KeyboardInterrupt):
                move_earlier(folder, HISTORY.branched(2), after_step)
        assert "is finished" in (finish_move(folder) or "")
        assert belongings(folder, after_step) == []
        assert before <= {*content(folder).values()}
        assert len(list((folder / "earlier-runs").iterdir())) == 1
        assert finish_move(folder) is None


def test_what_earlier_runs_take_is_counted_and_a_command_deletes_it(tmp_path: Path):
    assert earlier_size(tmp_path) == (0, 0)
    used_folder(tmp_path)
    size = sum(
        len(data) for name, data in content(tmp_path).items() if name not in ("config.json", "notes.txt", ".lock")
    )
    move_earlier(tmp_path, RunHistory.new(), None)
    assert earlier_size(tmp_path) == (1, size)
    assert delete_command(tmp_path) == f"rm -r {tmp_path}/earlier-runs"


@pytest.mark.parametrize("event", ["rename", "replace"])
def test_a_folder_that_is_renamed_or_replaced_is_noticed(tmp_path: Path, event: str):
    folder = tmp_path / "output"
    folder.mkdir()
    storage.write_json(folder / "run_history.json", HISTORY.to_json())
    guard = FolderGuard(folder)
    guard.require()
    folder.rename(tmp_path / "renamed")
    if event == "replace":
        folder.mkdir()
    with pytest.raises(DataError, match="renamed, deleted or replaced"):
        guard.require()
    if event == "rename":
        (tmp_path / "renamed").rename(folder)
        guard.require()


@pytest.mark.parametrize("what", ["file", "dangling link", "link to another disk"])
def test_earlier_runs_that_is_no_folder_of_this_disk_is_refused_before_anything_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
):
    used_folder(tmp_path)
    before = content(tmp_path)
    place = tmp_path / "earlier-runs"
    if what == "file":
        place.write_text("the user's")
    else:
        place.symlink_to("/proc" if what == "link to another disk" else tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a folder on the same disk") as caught:
        move_earlier(tmp_path, RunHistory.new(), None)
    assert caught.value.exit_code == 3
    place.unlink()
    assert content(tmp_path) == before
    assert finish_move(tmp_path) is None
