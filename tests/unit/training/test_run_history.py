"""Whose a file is: ids and branches by hand, folders of several runs, and moves over which a process dies."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from simpletuner import storage
from simpletuner.errors import DataError
from simpletuner.training.checkpoint import Checkpoints
from simpletuner.training.earlier_runs import Move, delete_command, earlier_size, finish_move, move_aside, move_earlier
from simpletuner.training.run_files import belongings, final_step, read_data_reports, step_of
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
    for history in (HISTORY, RunHistory("run", HISTORY.branches, adopts_unmarked=True)):
        assert RunHistory.from_json(json.loads(json.dumps(history.to_json()))) == history
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
    assert lines == ["run_history.json is missing: run run is continued from what checkpoint-6 says"]


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
    assert lines == [f"{tmp_path} was written by an earlier version of simpletuner: adopted as run {found.run_id}"]
    assert found.branches[0].after_step == 0
    of_several = [checkpoint(tmp_path, 4, HISTORY), checkpoint(tmp_path, 6, RunHistory.new())]
    found, lines = find_run_history(tmp_path, of_several)
    assert not found.owns(Mark("run", "c"), 4)
    assert not found.owns(None, 2)
    assert lines == []
    empty, lines = find_run_history(tmp_path / "empty", [])
    assert empty.owns(None, 2)
    assert lines == []
    assert len({each.run_id for each in (empty, found, RunHistory.new())}) == 3


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
    count = len(belongings(folder, None))
    assert line == f"what an earlier run left here is now in {folder} ({count} files and folders); nothing was deleted"
    kept = {"config.json", "notes.txt", ".lock"}
    assert content(folder) == {name: data for name, data in before.items() if name not in kept}
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "run_history.json", "earlier-runs"}
    assert read_run_history(tmp_path) == new
    assert move_earlier(tmp_path, new, None) is None


def test_going_back_moves_what_lies_after_the_step_and_copies_the_records(tmp_path: Path):
    used_folder(tmp_path)
    count = len(belongings(tmp_path, 2))
    line = move_earlier(tmp_path, HISTORY.branched(2), 2)
    folder = tmp_path / "earlier-runs" / "1-run-after-step-2"
    end = f"is now in {folder} ({count} files and folders); nothing was deleted"
    assert line == f"what this run made after step 2 {end}"
    assert read_run_history(folder) == HISTORY
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
        [moved] = (folder / "earlier-runs").iterdir()
        assert finish_move(folder) == f"a move to {moved} that was interrupted is finished"
        assert "moving" not in storage.read_json(folder / "run_history.json")
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
    assert delete_command(Path("my runs")) == "rm -r 'my runs/earlier-runs'"
    (tmp_path / "earlier-runs" / "link").symlink_to(tmp_path / "config.json")
    assert earlier_size(tmp_path) == (1, size)  # what a link points to is not there


def test_what_a_start_has_replaced_already_lies_with_the_run_that_it_was_of(tmp_path: Path):
    used_folder(tmp_path)
    for name in ("dataset_report.json", "dataset_set_aside.jsonl"):
        (tmp_path / name).write_text(f"earlier {name}")
    reports = read_data_reports(tmp_path)
    assert sorted(reports) == ["dataset_report.json", "dataset_set_aside.jsonl"]
    (tmp_path / "dataset_set_aside.jsonl").unlink()
    assert list(read_data_reports(tmp_path)) == ["dataset_report.json"]
    move_earlier(tmp_path, RunHistory.new(), None, reports)
    for name in reports:
        assert (tmp_path / "earlier-runs" / "1-run" / name).read_text() == f"earlier {name}"
    assert (tmp_path / "dataset_report.json").is_file()


def test_folders_of_earlier_runs_are_numbered_and_none_is_taken_twice(tmp_path: Path):
    for number in (1, 3):
        (tmp_path / f"earlier-runs/{number}-run").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    move_aside(tmp_path, tmp_path / "other")  # two are there, and the third number is taken
    (tmp_path / "file").write_text("y")
    move_aside(tmp_path, tmp_path / "file")
    names = {path.relative_to(tmp_path / "earlier-runs").as_posix() for path in tmp_path.rglob("earlier-runs/*/*")}
    assert names == {"4-run/other", "5-run/file"}


def test_all_that_a_run_can_have_left_is_its_own_and_nothing_else(tmp_path: Path):
    """The names as users and earlier versions know them."""
    files = [
        *("before_after.png", "all_steps.png", "loss.png", "report.html", "metrics.csv", "eval_losses.json"),
        *("run.lock.json", "pytorch_lora_weights.safetensors", "final_weights.json", "wandb_run.json"),
        *("hub_upload.json", "validation_external.log", "metrics.1.jsonl"),
    ]
    folders = [
        *("checkpoint-7", "checkpoint-best", "pipeline", "ema", "logs", "validation_images", "benchmarks", "wandb"),
        *("hub_upload", "webhooks", "contact_sheet", "damaged-checkpoint-4", "earlier-checkpoint-best-2"),
    ]
    others = ["checkpoint-x", "my-checkpoint-1", "dataset_report.json", "metrics.x.jsonl", "damaged-", "notes.txt"]
    for name in [*files, *others]:
        (tmp_path / name).write_text("x")
    for name in folders:
        (tmp_path / name / "a").mkdir(parents=True)
    assert belongings(tmp_path, None) == sorted(tmp_path / name for name in files)  # folders of nothing are nothing
    for name in folders:
        (tmp_path / name / "a" / "file").write_text("x")
    (tmp_path / "metrics.jsonl").write_text('{"event": "notice"}\n')  # of a start that failed before a run began
    assert belongings(tmp_path, None) == sorted(tmp_path / name for name in [*files, *folders])
    (tmp_path / "metrics.jsonl").write_text('{"event": "run_started"}\n')
    assert tmp_path / "metrics.jsonl" in belongings(tmp_path, None)
    assert belongings(tmp_path / "nowhere", None) == []


def test_final_weights_say_their_step_and_what_says_none_lies_after_every_step(tmp_path: Path):
    assert final_step(tmp_path) is None
    adapter = tmp_path / "pytorch_lora_weights.safetensors"
    adapter.write_bytes(b"damaged")
    assert (step_of(adapter), final_step(tmp_path)) == (-1, -1)
    assert adapter in belongings(tmp_path, 3)
    save_file({"a": torch.zeros(1)}, adapter, {"global_step": "3"})
    assert (step_of(adapter), final_step(tmp_path)) == (3, 3)
    assert belongings(tmp_path, 3) == []
    assert belongings(tmp_path, 2) == [adapter]
    with storage.commit_dir(tmp_path / "pipeline", {"global_step": 5}) as folder:
        (folder / "weights").write_text("x")
    assert (step_of(tmp_path / "pipeline"), final_step(tmp_path)) == (5, 5)
    (tmp_path / "ema").mkdir()
    assert step_of(tmp_path / "ema") == -1
    adapter.rename(tmp_path / "ema" / adapter.name)
    (tmp_path / "pipeline").rename(tmp_path / "ema" / "pipeline")
    assert step_of(tmp_path / "ema") == 5
    (tmp_path / "final_weights.json").write_text('{"step": 0}')
    assert belongings(tmp_path, 0) == [tmp_path / "ema"]
    (tmp_path / "final_weights.json").write_text('{"stop": 0}')
    assert belongings(tmp_path, 5) == [tmp_path / "final_weights.json"]


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


def test_a_folder_without_a_history_that_is_replaced_is_noticed_until_one_is_written(tmp_path: Path):
    folder = tmp_path / "output"
    folder.mkdir()
    guard = FolderGuard(folder)
    folder.rename(tmp_path / "renamed")
    folder.mkdir()
    assert not guard.is_there()
    (tmp_path / "renamed").rename(folder)
    storage.write_json(folder / "run_history.json", HISTORY.to_json())
    guard.note_history()
    folder.rename(tmp_path / "renamed")
    folder.mkdir()
    assert not guard.is_there()
    storage.write_json(folder / "run_history.json", HISTORY.to_json())
    assert guard.is_there()  # a network that numbers its folders anew shows the same history


def test_a_folder_that_is_deleted_and_made_again_is_noticed_on_a_disk_that_reuses_inodes():
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # ext4 gives the new folder the old one's inode
        folder = Path(name) / "output"
        for _ in range(3):
            folder.mkdir()
            guard = FolderGuard(folder)
            assert guard.is_there()
            folder.rmdir()
            folder.mkdir()
            assert not guard.is_there()
            folder.rmdir()


def test_a_guard_that_is_gone_holds_no_folder_open(tmp_path: Path):
    guard = FolderGuard(tmp_path)
    assert open_folders(tmp_path) == 1
    del guard
    assert open_folders(tmp_path) == 0


def open_folders(folder: Path) -> int:
    """How many descriptors of this process are of a folder."""
    links = Path("/proc/self/fd").iterdir()
    return sum(os.path.realpath(link) == str(folder.resolve()) for link in links)


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


def test_a_folder_that_a_network_shows_under_another_number_is_the_same_one(tmp_path: Path, monkeypatch):
    storage.write_json(tmp_path / "run_history.json", HISTORY.to_json())
    guard = FolderGuard(tmp_path)
    (tmp_path / "away").mkdir()
    look = FolderGuard._look
    monkeypatch.setattr(FolderGuard, "_look", lambda self: (1, 2))
    assert guard.is_there()
    storage.write_json(tmp_path / "run_history.json", RunHistory.new().to_json())
    assert guard.is_there()  # it has that number now
    monkeypatch.setattr(FolderGuard, "_look", look)
    assert not guard.is_there()

    def away(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "stat", away)
    assert guard.is_there()


def test_a_move_that_is_finished_later_leaves_the_records_of_before(tmp_path: Path):
    """They were copied before the first file was moved; what a later program wrote is none of them."""
    used_folder(tmp_path)
    folder = tmp_path / "earlier-runs" / "1-run"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("of before")
    move = Move("1-run", 2, None)
    storage.write_json(tmp_path / "run_history.json", {**HISTORY.to_json(), "moving": move.to_json()})
    assert finish_move(tmp_path) is not None
    assert (folder / "metrics.jsonl").read_text() == "of before"
    assert (folder / "metrics.csv").read_bytes() == (tmp_path / "metrics.csv").read_bytes()


@pytest.mark.parametrize(
    ("written", "folder"), [("../../else/where", "where"), ("/etc", "etc"), ("..", None), ("", None)]
)
def test_a_move_goes_into_earlier_runs_whatever_is_written(written: str, folder: str | None):
    noted = {"folder": written, "after_step": None, "history": None}
    if folder is None:
        with pytest.raises(ValueError, match="not a move into earlier-runs/"):
            Move.from_json(noted)
    else:
        assert Move.from_json(noted).folder == folder
