"""Entries that another folder of the cache has: linked where all of a file is wanted, copied where not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from simpletuner.cache.adopting import adopt, folders_beside, opened
from simpletuner.cache.store import QUARANTINE, TensorStore


def put(folder: Path, *keys: str) -> Path:
    with TensorStore(folder) as store:
        store.put_many({key: {"mean": torch.tensor([float(len(key))])} for key in keys})
    return folder


def inodes(folder: Path) -> set[int]:
    return {path.stat().st_ino for path in folder.glob("shard-*.safetensors")}


def test_the_folders_beside_are_all_that_hold_entries_but_the_own_one_and_what_is_damaged(tmp_path: Path) -> None:
    for name in ("vae/b", "vae/a", "own", f"vae/a/{QUARANTINE}"):
        put(tmp_path / name, "key")
    (tmp_path / "empty").mkdir()
    assert folders_beside(tmp_path, tmp_path / "vae" / ".." / "own") == [tmp_path / "vae/a", tmp_path / "vae/b"]


def test_a_file_of_which_all_is_wanted_is_linked_and_of_another_the_wanted_part_is_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = put(tmp_path / "whole", "a", "bb")
    part = put(tmp_path / "part", "ccc", "dddd")
    with TensorStore(tmp_path / "own") as store, opened([whole, part]) as others:
        monkeypatch.setattr(others[0], "get", lambda key: pytest.fail("what is linked is copied too"))
        assert adopt(store, ["a", "bb", "ccc", "eeeee"], others) == 3
        assert store.keys() == ["a", "bb", "ccc"]
        assert [store.get(key)["mean"].item() for key in store.keys()] == [1, 2, 3]  # noqa: SIM118
        assert inodes(whole) < inodes(tmp_path / "own")
        assert not inodes(part) & inodes(tmp_path / "own")
        assert store.stats().num_shards == 2
        assert adopt(store, ["a", "bb", "ccc"], others) == 0


def test_where_files_cannot_be_linked_their_entries_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*names: object) -> None:
        raise OSError(95, "Operation not supported")

    other = put(tmp_path / "other", "a", "bb")
    monkeypatch.setattr(os, "link", refuse)
    with TensorStore(tmp_path / "own") as store, opened([other]) as others:
        assert adopt(store, ["a", "bb"], others) == 2
        assert store.get("bb")["mean"].item() == 2
