"""A store whose files are damaged, cut, or of somebody else: damage is reported and costs only what it hit."""

from __future__ import annotations

import contextlib
import os
import pickle
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simpletuner import storage
from simpletuner.cache import shards
from simpletuner.cache.index import INDEX_NAME
from simpletuner.cache.shards import DamagedShard, load_entry, read_entries
from simpletuner.cache.store import QUARANTINE, DamagedEntry, TensorStore
from simpletuner.errors import DataError
from tests.unit.cache.store_entries import entries, entry, flip_in_entry, shard_files


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def test_a_flipped_bit_is_found_in_get_and_costs_only_its_entry(folder):
    with TensorStore(folder) as store:
        store.put_many(entries(5))
    flip_in_entry(shard_files(folder)[0], "key3")
    with TensorStore(folder) as store:
        assert torch.equal(store.get("key2")["mean"], entry(2)["mean"])
        with pytest.raises(DamagedEntry) as caught:
            store.get("key3")
        assert caught.value.key == "key3"
        assert store.missing(entries(5)) == ["key3"]
        assert all(torch.equal(store.get(f"key{i}")["std"], entry(i)["std"]) for i in (0, 1, 2, 4))
        assert len(list((folder / QUARANTINE).iterdir())) == 1
        store.put_many({"key3": entry(3)})
        assert store.verify() == []


@pytest.mark.slow
def test_no_flipped_bit_anywhere_in_a_shard_gives_a_wrong_value(folder):
    """Every bit of a small shard, header included: an entry reads as it was, or is missing, or is damaged."""
    values = {"k": [1.0, 2.0], "m": [3.0]}
    with TensorStore(folder) as store:
        store.put_many({key: {"a": torch.tensor(value)} for key, value in values.items()})
    (shard,) = shard_files(folder)
    data = shard.read_bytes()
    data_start = 8 + int.from_bytes(data[:8], "little")
    for bit in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        shard.write_bytes(flipped)
        found = _read_all(shard)
        assert all(found[key]["a"].tolist() == value for key, value in values.items() if key in found), bit
        if bit >= 8 * data_start:
            assert len(found) == 1, bit


def _read_all(shard: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The entries of a shard that are sound."""
    found = {}
    try:
        entries = read_entries(shard)
    except (DamagedShard, DataError):
        return {}
    with shard.open("rb") as file:
        for key, entry in entries.items():
            with contextlib.suppress(DamagedShard):
                found[key] = load_entry(file.fileno(), key, entry)
    return found


def test_a_cut_shard_is_found_and_what_is_left_of_it_is_kept(folder):
    with TensorStore(folder) as store:
        store.put_many(entries(4))
    (shard,) = shard_files(folder)
    os.truncate(shard, shard.stat().st_size - 30)
    with TensorStore(folder) as store:
        missing = store.missing(entries(4))
        assert 1 <= len(missing) < 4
        assert store.verify() == missing
        store.put_many({key: entries(4)[key] for key in missing})
        assert all(torch.equal(store.get(key)["std"], tensors["std"]) for key, tensors in entries(4).items())


def test_a_shard_cut_while_the_store_is_open_is_damage_and_no_crash(folder):
    with TensorStore(folder) as store:
        store.put_many(entries(4))
        store.get("key0")
        os.truncate(shard_files(folder)[0], 20)
        with pytest.raises(DamagedEntry):
            store.get("key1")
        assert len(store.missing(entries(4))) == 4


@pytest.mark.parametrize("damage", ["missing", "garbage", "inside", "older", "lying"])
def test_the_index_is_made_again_where_it_cannot_be_trusted(folder, damage):
    with TensorStore(folder) as store:
        store.put_many(entries(50))
    index = folder / INDEX_NAME
    if damage == "missing":
        index.unlink()
    elif damage == "garbage":
        index.write_bytes(b"not a database" * 1000)
    elif damage == "inside":
        data = bytearray(index.read_bytes())
        data[4096:] = b"\xff" * (len(data) - 4096)
        index.write_bytes(data)
    elif damage == "older":
        with sqlite3.connect(index) as database:
            database.execute("PRAGMA user_version = 77")
            database.execute("DELETE FROM entries WHERE key = 'key9'")
    else:
        with sqlite3.connect(index) as database:
            database.execute("UPDATE entries SET entry = (SELECT entry FROM entries WHERE key = 'key9')")
    with TensorStore(folder) as store:
        assert store.missing(entries(51)) == ["key50"]
        assert all(torch.equal(store.get(key)["mean"], each["mean"]) for key, each in entries(50).items())
    assert not (folder / QUARANTINE).exists()


def test_a_pickle_and_other_files_in_the_folder_are_never_touched(folder, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    with TensorStore(folder) as store:
        store.put_many(entries(1))
        (folder / "latents.pt").write_bytes(pickle.dumps(Bomb()))
        (folder / "notes.safetensors").write_text("mine")
        store.refresh()
        store.verify()
        store.prune([])
        assert store.keys() == []
    assert sorted(path.name for path in folder.iterdir()) == [INDEX_NAME, "latents.pt", "notes.safetensors"]
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("change", [{"shape": (7,)}, {"dtype": "F77"}, {"shape": (-1, -1)}], ids=str)
def test_a_type_or_shape_that_cannot_be_is_damage_though_its_sha256_fits(tmp_path, monkeypatch, change):
    TensorStore(tmp_path).put_many(entries(1))
    (shard,) = shard_files(tmp_path)
    entry = read_entries(shard)["key0"]
    forged = replace(entry, tensors=tuple(place._replace(**change) for place in entry.tensors))
    monkeypatch.setattr(shards, "_add_to_digest", lambda *arguments: None)
    forged = replace(forged, digest=shards._start_digest("key0").hexdigest())
    descriptor = os.open(shard, os.O_RDONLY)
    with contextlib.closing(os.fdopen(descriptor)), pytest.raises(DamagedShard, match="impossible type or shape"):
        load_entry(descriptor, "key0", forged)


def test_a_shard_of_a_newer_version_is_reported_and_left_alone(folder):
    folder.mkdir()
    shard = folder / f"shard-{'0' * 32}.safetensors"
    storage.save_tensors(
        shard, {"k/a": torch.ones(1)}, {"format": "simpletuner-cache", "version": "2", "digests": "{}"}
    )
    with pytest.raises(DataError, match="cache format 2"):
        TensorStore(folder)
    assert shard.exists()


def test_an_index_without_room_is_an_error_that_says_so_and_loses_no_shard(folder):
    with TensorStore(folder) as store:
        store.put_many(entries(1))
        store._index._database.execute("PRAGMA max_page_count = 1")  # SQLite's own disk that is full
        with pytest.raises(DataError, match="full"):
            store.put_many(entries(400, start=1))
    with TensorStore(folder) as again:
        assert again.stats().num_entries == 401


def test_a_shard_that_lost_its_last_byte_has_lost_its_last_entry(folder):
    with TensorStore(folder) as store:
        store.put_many({"a": {"x": torch.zeros(2)}, "b": {"x": torch.ones(2)}})
    [shard] = shard_files(folder)
    os.truncate(shard, shard.stat().st_size - 1)
    with TensorStore(folder) as store:
        assert store.missing(["a", "b"]) == ["b"]
        assert [path.name for path in (folder / QUARANTINE).iterdir()] == [shard.name]


def test_a_file_of_another_program_under_a_shard_s_name_is_moved_away_unread(folder):
    folder.mkdir()
    shard = folder / f"shard-{'a' * 32}.safetensors"
    storage.save_tensors(shard, {"k/a": torch.ones(1)}, {"version": "1", "digests": '{"k": ""}'})
    with TensorStore(folder) as store:
        assert store.keys() == []
    assert [path.name for path in (folder / QUARANTINE).iterdir()] == [shard.name]


def test_what_another_process_removed_is_missing_and_what_vanishes_meanwhile_is_no_damage(folder):
    with TensorStore(folder) as reader, TensorStore(folder) as other:
        other.put_many(entries(2))
        other.put_many(entries(1, start=2))
        assert reader.missing(entries(3)) == []
        other.prune(["key2"])
        assert reader.missing(entries(3)) == ["key0", "key1"]
        assert reader.stats().num_shards == 1
        assert reader._index.add(f"shard-{'0' * 32}.safetensors")
        shard_files(folder)[0].unlink()  # by hand: nobody has told the index
        assert reader.missing(entries(3)) == ["key0", "key1", "key2"]


def test_a_key_that_is_nowhere_makes_the_index_again_once(folder, monkeypatch):
    with TensorStore(folder) as store:
        store.put_many(entries(2))
        read = []
        monkeypatch.setattr(
            "simpletuner.cache.index.read_entries", lambda path: (read.append(path), read_entries(path))[1]
        )
        for key in ("x", "y", "z"):
            with pytest.raises(KeyError):
                store.get(key)
    assert read == shard_files(folder)
