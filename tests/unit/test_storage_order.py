"""The order in which the commit protocol asks the system for things: what a crash of the machine would find.

A kill of the process never loses what was written, so no test that kills can see a missing fsync.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from simpletuner import storage
from simpletuner.errors import DataError


def commit(path: Path, text: str) -> None:
    with storage.commit_dir(path) as folder:
        storage.write_bytes(folder / "data.txt", text.encode())


@pytest.fixture
def operations(tmp_path, monkeypatch) -> list[tuple[str, str]]:
    """What the system is asked to bring to the disk and to rename, in order; folders end with `/`.

    A temporary sibling shows as `TMP`, one that was moved out of the way as `ASIDE`.
    """
    seen: list[tuple[str, str]] = []

    def shown(path: str | os.PathLike) -> str:
        parts = Path(os.path.relpath(path, tmp_path)).parts
        kinds = {".tmp": "TMP", ".asi": "ASIDE", ".tra": "TRASH"}
        return "/".join(kinds.get(part[:4], part) for part in parts) or "."

    fsync, rename, replace = os.fsync, os.rename, os.replace

    def record_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        seen.append(("fsync", shown(path) + ("/" if path.is_dir() else "")))
        fsync(descriptor)

    def record_rename(how):
        def renamed(source, target, **options):
            seen.append(("rename", f"{shown(source)} -> {shown(target)}"))
            how(source, target, **options)

        return renamed

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "rename", record_rename(rename))
    monkeypatch.setattr(os, "replace", record_rename(replace))
    return seen


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_before_the_call_returns(tmp_path, operations):
    storage.write_bytes(tmp_path / "a.json", b"1")
    assert operations == [("fsync", "TMP"), ("rename", "TMP -> a.json"), ("fsync", "./")]


def test_what_belongs_to_a_file_has_its_name_before_the_file_has(tmp_path, operations):
    """Both `a.json` and `z.json` sort around the main file, which comes last."""
    with storage.replacing_file(tmp_path / "m.safetensors") as temporary:
        for name in ("m.safetensors", "z.json", "a.json"):
            temporary.with_name(name).write_text(name)
    assert operations == [
        ("fsync", "TMP/a.json"),
        ("rename", "TMP/a.json -> a.json"),
        ("fsync", "TMP/z.json"),
        ("rename", "TMP/z.json -> z.json"),
        ("fsync", "TMP/m.safetensors"),
        ("rename", "TMP/m.safetensors -> m.safetensors"),
        ("fsync", "./"),
    ]


def test_a_folder_is_on_the_disk_file_by_file_then_its_manifest_then_itself_then_its_name(tmp_path, operations):
    with storage.commit_dir(tmp_path / "a") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "two").write_text("2")
        (folder / "one").write_text("1")
    assert operations == [
        ("fsync", "TMP/one"),
        ("fsync", "TMP/sub/two"),
        ("fsync", "TMP/sub/"),
        ("fsync", "TMP/TMP"),
        ("rename", "TMP/TMP -> TMP/manifest.json"),
        ("fsync", "TMP/"),
        ("rename", "TMP -> a"),
        ("fsync", "./"),
    ]


def test_folders_in_a_folder_are_on_the_disk_the_innermost_first_and_all_of_them(tmp_path, operations):
    with storage.commit_dir(tmp_path / "a") as folder:
        for name in ("b", "c/d"):
            (folder / name).mkdir(parents=True)
            (folder / name / "file").write_text("1")
    folders = [name for call, name in operations if call == "fsync" and name.endswith("/")]
    assert folders == ["TMP/c/d/", "TMP/c/", "TMP/b/", "TMP/", "./"]


def test_files_of_a_folder_that_is_committed_are_brought_to_the_disk_once(tmp_path, operations):
    with storage.commit_dir(tmp_path / "a") as folder:
        storage.save_tensors(folder / "w.safetensors", {"weight": torch.ones(2)})
        storage.write_json(folder / "state.json", {"step": 1})
    synced = [name for call, name in operations if call == "fsync"]
    assert synced == ["TMP/state.json", "TMP/w.safetensors", "TMP/TMP", "TMP/", "./"]


def test_an_older_folder_is_moved_away_first_and_removed_when_the_new_one_has_its_name(
    tmp_path, operations, monkeypatch
):
    commit(tmp_path / "a", "old")
    operations.clear()
    rmtree = storage.shutil.rmtree

    def remove(path, **options):
        operations.append(("remove", Path(path).name[:6]))
        rmtree(path, **options)

    monkeypatch.setattr(storage.shutil, "rmtree", remove)
    commit(tmp_path / "a", "new")
    assert operations[-4:] == [
        ("rename", "a -> ASIDE"),
        ("rename", "TMP -> a"),
        ("fsync", "./"),
        ("remove", ".aside"),
    ]


def test_a_folder_is_renamed_before_it_is_removed(tmp_path, operations):
    commit(tmp_path / "a", "x")
    operations.clear()
    storage.remove_dir(tmp_path / "a")
    assert operations == [("rename", "a -> TRASH"), ("fsync", "./")]


def test_an_older_folder_comes_back_where_the_new_one_cannot_have_its_name(tmp_path, monkeypatch):
    commit(tmp_path / "a", "old")
    rename = os.rename

    def refuse(source, target, **options):
        if "tmp" in Path(source).name and Path(target).name == "a":
            raise OSError(errno.ENOSPC, "full")
        rename(source, target, **options)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(DataError):
        commit(tmp_path / "a", "new")
    assert (tmp_path / "a" / "data.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_move_is_on_the_disk_in_both_folders_when_it_returns(tmp_path, operations):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    (tmp_path / "old/a").write_text("a")
    storage.move(tmp_path / "old/a", tmp_path / "new/a")
    assert operations == [("rename", "old/a -> new/a"), ("fsync", "new/"), ("fsync", "old/")]


def test_a_damaged_folder_does_not_stay_in_place_of_an_equal_one(tmp_path):
    """Also where the damage lies in a file that a quick check does not read."""
    for _ in range(2):
        with storage.commit_dir(tmp_path / "a") as folder:
            (folder / "weights").write_bytes(bytes((1 << 20) + 1))
        assert storage.verify_dir(tmp_path / "a") == []
        with (tmp_path / "a" / "weights").open("r+b") as file:
            file.write(b"x")
    assert storage.verify_dir(tmp_path / "a", full=False) == []
