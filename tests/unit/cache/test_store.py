"""The store of tensors: what is put comes back bit for bit, and is committed in shards."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import sqlite3
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import current_thread
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from simpletuner import storage
from simpletuner.cache import store as store_module
from simpletuner.cache.index import ShardIndex
from simpletuner.cache.shards import read_entries, write_shard
from simpletuner.cache.store import DamagedEntry, StoreWriter, TensorStore
from simpletuner.errors import DataError
from tests.unit.cache.store_entries import entries, entry, flip_in_entry, shard_files


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "store"


def test_tensors_of_every_kind_come_back_bit_for_bit(folder):
    tensors = {
        "scalar": torch.tensor(3),
        "empty": torch.zeros(0, 4),
        "bool": torch.tensor([True, False, True]),
        "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        "ids": torch.arange(7),
        "strided": torch.arange(12.0).reshape(3, 4).T,
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    with TensorStore(folder) as store:
        store.put_many({"key": tensors})
    with TensorStore(folder) as store:
        loaded = store.get("key")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        same_bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (loaded[name], tensor)]
        assert torch.equal(*same_bits)


def test_the_public_library_reads_a_shard_and_the_digest_is_there(folder):
    with TensorStore(folder) as store:
        store.put_many({"abc": {"mean": torch.tensor([1.0, 2.0])}})
    (shard,) = shard_files(folder)
    with safe_open(shard, "pt") as file:
        assert torch.equal(file.get_tensor("abc/mean"), torch.tensor([1.0, 2.0]))
        digests = json.loads(file.metadata()["digests"])
    # Key, then name, type and shape, then the bytes: 1.0 and 2.0 in little-endian float32.
    expected = hashlib.sha256(b"abc" + b'["mean", "F32", [2]]' + bytes.fromhex("0000803f00000040")).hexdigest()
    assert digests == {"abc": expected}


@pytest.mark.parametrize("length", range(1, 9))
def test_the_numbers_of_a_shard_begin_at_a_multiple_of_eight_bytes_where_its_header_says(folder, length):
    folder.mkdir()
    columns = torch.arange(6.0).reshape(2, 3)[:, 1:]
    path = write_shard(folder, {"k" * length: {"x": columns, "flag": torch.tensor([True])}, "z": {"x": columns}})
    content = path.read_bytes()
    assert int.from_bytes(content[:8], "little") % 8 == 0
    (place,) = read_entries(path)["z"].tensors
    assert struct.unpack("<4f", content[place.start : place.end]) == (1.0, 2.0, 4.0, 5.0)
    assert {key: tensor.tolist() for key, tensor in load_file(path).items()} == {
        f"{'k' * length}/flag": [True],
        f"{'k' * length}/x": [[1.0, 2.0], [4.0, 5.0]],
        "z/x": [[1.0, 2.0], [4.0, 5.0]],
    }


def test_a_shard_that_another_process_has_moved_at_once_is_encoded_again(folder, monkeypatch):
    def moved(*arguments):
        path = write_shard(*arguments)
        path.unlink()
        return path

    monkeypatch.setattr(store_module, "write_shard", moved)
    with TensorStore(folder) as store:
        store.put_many(entries(1))
        assert store.missing(["key0"]) == ["key0"]


def test_rows_of_one_batch_may_be_kept_under_their_own_keys(folder):
    batch = torch.arange(6.0).reshape(3, 2)
    with TensorStore(folder) as store:
        store.put_many({"a": {"x": batch[0], "y": batch[0]}, "b": {"x": batch[2]}})
        assert store.get("a")["y"].tolist() == [0.0, 1.0]
        assert store.get("b")["x"].tolist() == [4.0, 5.0]
    assert sum(shard.stat().st_size for shard in shard_files(folder)) < 1000


def test_missing_keys_keep_their_order_and_appear_once(folder):
    with TensorStore(folder) as store:
        store.put_many(entries(2))
        assert store.missing(["z", "key1", "a", "z", "key0"]) == ["z", "a"]
        assert "key1" in store
        assert "z" not in store
        assert store.keys() == ["key0", "key1"]
        with pytest.raises(KeyError):
            store.get("z")


def test_what_is_there_keeps_its_value_and_is_not_written_twice(folder):
    with TensorStore(folder) as store:
        store.put_many(entries(2))
        store.put_many({**entries(3), "key0": entry(99)})
        assert store.get("key0")["mean"][0, 0] == 0
        assert store.stats().num_entries == 3
    names = [name for shard in shard_files(folder) for name in safe_open(shard, "pt").keys()]  # noqa: SIM118
    assert len(names) == len(set(names)) == 6


def test_the_writer_commits_by_count_by_bytes_by_time_and_at_the_end(folder, monkeypatch):
    with TensorStore(folder) as store:
        with StoreWriter(store, max_entries=3) as writer:
            for key, tensors in entries(4).items():
                writer.put(key, tensors)
            assert len(shard_files(folder)) == 1
            assert writer.waiting("key3") is not None
            assert writer.waiting("key0") is None
        assert len(shard_files(folder)) == 2
        with StoreWriter(store, max_bytes=48) as writer:
            writer.put("bytes", entry(0))
            assert "bytes" in store
        with StoreWriter(store, max_seconds=0.0) as writer:
            writer.put("time", entry(0))
            assert "time" in store
        assert store.stats().num_entries == 6


def test_what_was_put_before_an_error_stays(folder):
    def fail() -> None:
        with StoreWriter(store) as writer:
            writer.put("key0", entry(0))
            raise KeyboardInterrupt

    with TensorStore(folder) as store:
        with pytest.raises(KeyboardInterrupt):
            fail()
        assert "key0" in store


def test_a_full_disk_is_reported_and_what_was_there_stays(folder, monkeypatch):
    def full(name: str) -> None:
        raise OSError(28, "No space left on device")

    with TensorStore(folder) as store:
        store.put_many(entries(2))
        with monkeypatch.context() as patch:
            patch.setattr(storage, "_step", full)
            writer = StoreWriter(store)
            writer.put("new", entry(5))
            with pytest.raises(DataError, match="disk is full"):
                writer.flush()
            writer.flush()  # does not try the same again
        assert store.keys() == ["key0", "key1"]
        assert store.verify() == []


def test_a_writer_with_an_executor_commits_there_and_says_at_the_next_commit_that_the_disk_is_full(folder, monkeypatch):
    def full(name: str) -> None:
        raise OSError(28, "No space left on device")

    threads = set()
    with TensorStore(folder) as store, ThreadPoolExecutor(1, "writes") as executor:
        commit = store.put_many
        monkeypatch.setattr(store, "put_many", lambda entries: threads.add(current_thread().name) or commit(entries))
        with StoreWriter(store, max_entries=2, executor=executor) as writer:
            for key, tensors in entries(5).items():
                writer.put(key, tensors)
        assert threads == {"writes_0"}
        assert sorted(len(store._index.keys_of(shard.name)) for shard in shard_files(folder)) == [1, 2, 2]
        writer = StoreWriter(store, max_entries=1, executor=executor)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "_step", full)
            writer.put("new", entry(5))
            with pytest.raises(DataError, match="disk is full"):
                writer.put("newer", entry(6))
        writer.flush()
        assert len(store.keys()) == 5


def test_a_second_start_reads_no_shard(folder, monkeypatch):
    with TensorStore(folder) as store:
        store.put_many(entries(3))

    def unexpected(path: Path) -> None:
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("simpletuner.cache.index.read_entries", unexpected)
    with TensorStore(folder) as store:
        assert store.missing(entries(3)) == []


def test_prune_keeps_what_it_is_asked_and_frees_the_rest(folder):
    with TensorStore(folder) as store:
        store.put_many(entries(4))
        store.put_many(entries(4, start=4))
        before = sum(shard.stat().st_size for shard in shard_files(folder))
        freed = store.prune(["key1", "key2"])
        assert freed == before - sum(shard.stat().st_size for shard in shard_files(folder))
        assert freed > 0
        assert store.keys() == ["key1", "key2"]
        assert torch.equal(store.get("key2")["std"], entry(2)["std"])
        left = shard_files(folder)
        assert store.prune(["key1", "key2", "key9"]) == store.prune(["key1", "key2"]) == 0
        assert shard_files(folder) == left  # what is kept whole is not written again


def test_a_reader_survives_a_prune_by_somebody_else(folder):
    with TensorStore(folder) as reader, TensorStore(folder) as other:
        other.put_many(entries(4))
        assert reader.missing(entries(4)) == []
        other.prune(["key1"])
        assert torch.equal(reader.get("key1")["mean"], entry(1)["mean"])
        with pytest.raises(KeyError):
            reader.get("key0")


def test_a_folder_that_cannot_be_written_is_read_all_the_same(folder, monkeypatch):
    with TensorStore(folder) as store:
        store.put_many(entries(3))
    flip_in_entry(shard_files(folder)[0], "key1")

    def refuse(*args: object) -> sqlite3.Connection:
        raise sqlite3.OperationalError("attempt to write a readonly database")

    def read_only(name: str) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("simpletuner.cache.index._connect", refuse)
    monkeypatch.setattr(storage, "_step", read_only)
    files = sorted(path.name for path in folder.iterdir())
    with TensorStore(folder) as store:
        assert torch.equal(store.get("key0")["mean"], entry(0)["mean"])
        with pytest.raises(DamagedEntry):
            store.get("key1")
        assert store.missing(entries(3)) == ["key1"]
        assert torch.equal(store.get("key2")["mean"], entry(2)["mean"])
        with pytest.raises(DataError, match="read-only"):
            store.put_many(entries(1, start=9))
    assert sorted(path.name for path in folder.iterdir()) == files


def _fill(folder: Path, start: int, count: int) -> None:
    with TensorStore(folder) as store, StoreWriter(store, max_entries=7) as writer:
        for key, tensors in entries(count, start).items():
            writer.put(key, tensors)


@pytest.mark.slow
def test_two_processes_fill_one_store_at_once(folder):
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_fill, args=(folder, start, 120)) for start in (0, 60)]
    for writer in writers:
        writer.start()
    with TensorStore(folder) as reader:
        while any(writer.is_alive() for writer in writers):
            for key in reader.keys():  # noqa: SIM118
                assert torch.equal(reader.get(key)["mean"], entry(int(key[3:]))["mean"])
        for writer in writers:
            writer.join()
            assert writer.exitcode == 0
        assert len(reader.keys()) == reader.stats().num_entries == 180
        assert reader.verify() == []


@pytest.mark.slow
def test_a_forked_child_reads_with_files_of_its_own(folder):
    code = f"""
import os, sys
from simpletuner.cache.store import TensorStore
store = TensorStore({str(folder)!r})
pid = os.fork()
if pid == 0:
    os._exit(0 if store.get("key0")["mean"].shape == (2, 3) and "key1" in store else 1)
status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert store.get("key1")["mean"][0, 0] == 1
sys.exit(status)
"""
    with TensorStore(folder) as store:
        store.put_many(entries(2))
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_what_is_complete_is_so_until_a_shard_goes_or_changes(folder):
    with TensorStore(folder) as store:
        store.put_many(entries(2))
        assert store.complete("all") is None
        store.note_complete("all", 2)
        store.put_many(entries(1, start=2))
        assert store.complete("all") == 2
    with TensorStore(folder) as again:
        assert again.complete("all") == 2
        again.prune(entries(2))  # removes the shard of the third alone
        assert again.complete("all") is None
        again.note_complete("all", 2)
        [shard] = shard_files(folder)
        other = folder / "other"
        with TensorStore(other) as elsewhere:
            elsewhere.put_many(entries(1))
        shard_files(other)[0].replace(shard)
        assert again.complete("all") is None


def test_a_folder_that_cannot_be_written_still_says_what_is_complete(folder, monkeypatch):
    with TensorStore(folder) as store:
        store.put_many(entries(2))
        store.note_complete("all", 2)

    def refuse(path):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    monkeypatch.setattr("simpletuner.cache.index._connect", refuse)
    with TensorStore(folder) as reader:
        assert reader.complete("all") == 2
        assert reader.get("key1")["mean"][0, 0] == 1.0


def test_many_keys_are_looked_for_in_parts(folder, monkeypatch):
    monkeypatch.setattr("simpletuner.cache.index._KEYS_PER_QUERY", 2)
    with TensorStore(folder) as store:
        store.put_many(entries(5))
        assert store.missing(entries(6)) == ["key5"]


def test_an_entry_that_two_shards_hold_counts_once_and_their_bytes_twice(folder):
    with TensorStore(folder) as store:
        store.put_many(entries(2))
        [shard] = shard_files(folder)
        shard.with_name(f"shard-{'0' * 32}.safetensors").write_bytes(shard.read_bytes())
        stats = store.stats()
        assert (stats.num_entries, stats.num_shards) == (2, 2)
        assert stats.num_bytes == 2 * shard.stat().st_size
        assert store.keys() == ["key0", "key1"]


def test_a_full_shard_begins_the_next_one_empty(folder):
    """An entry has 48 bytes: shards of two of them, and the fifth waits."""
    with TensorStore(folder) as store:
        writer = StoreWriter(store, max_bytes=96)
        for key, tensors in entries(5).items():
            writer.put(key, tensors)
        assert [len(read_entries(shard)) for shard in shard_files(folder)] == [2, 2]
        assert writer.waiting("key4") is not None


def test_an_entry_waits_no_longer_than_it_may_counted_from_the_first_that_waits(folder, monkeypatch):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr("simpletuner.cache.store.time", clock)
    with TensorStore(folder) as store:
        writer = StoreWriter(store, max_seconds=30.0)
        counts = []
        for key, seconds in (("a", 100.0), ("b", 129.0), ("c", 130.0), ("d", 159.0), ("e", 188.0), ("f", 189.0)):
            clock.now = seconds
            writer.put(key, entry(0))
            counts.append(store.stats().num_entries)
    assert counts == [0, 0, 3, 3, 3, 6]


def test_few_shards_are_open_at_once_those_that_were_used_last(folder, monkeypatch):
    monkeypatch.setattr("simpletuner.cache.store._OPEN_SHARDS", 2)
    opened = []
    with TensorStore(folder) as store:
        for number in range(3):
            store.put_many(entries(1, start=number))
        real = os.open
        monkeypatch.setattr(os, "open", lambda path, *args: (opened.append(path), real(path, *args))[1])
        for number in (0, 1, 0, 2, 0, 1):
            assert store.get(f"key{number}")["mean"][0, 0] == number
        monkeypatch.undo()
        held = [store._index.find(f"key{number}")[0] for number in range(3)]
        assert [path.name for path in opened] == [held[0], held[1], held[2], held[1]]
        descriptor = store._open_shards[held[1]]
        store.prune(["key0"])
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(descriptor)


def test_a_forked_child_opens_the_index_once(folder, monkeypatch):
    opened = []
    with TensorStore(folder) as store:
        store.put_many(entries(2))
        monkeypatch.setattr(store_module, "ShardIndex", lambda path: opened.append(path) or ShardIndex(path))
        assert "key0" in store
        assert opened == []
        child = os.getpid() + 1
        monkeypatch.setattr(store_module.os, "getpid", lambda: child)
        assert ["key0" in store, "key1" in store, "key2" in store] == [True, True, False]
        assert opened == [folder]


def test_a_store_that_is_closed_twice_closes_no_file_that_was_opened_since(folder, tmp_path):
    store = TensorStore(folder)
    store.put_many(entries(1))
    store.get("key0")
    descriptor = next(iter(store._open_shards.values()))
    store.close()
    os.dup2(other := os.open(tmp_path, os.O_RDONLY), descriptor)  # the number is taken by a file of somebody else
    store.close()
    os.fstat(descriptor)
    for each in {other, descriptor}:
        os.close(each)
