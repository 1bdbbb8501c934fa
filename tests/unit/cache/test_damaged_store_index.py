"""Bits that flip in the index of a store: whatever it says, each entry is the one that was written."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import sqlite3
from pathlib import Path

import pytest
import torch

from simpletuner import tempnames
from simpletuner.cache.index import INDEX_NAME
from simpletuner.cache.shards import DamagedShard, Entry, TensorPlace, read_entries
from simpletuner.cache.store import QUARANTINE, StoreStats, TensorStore
from simpletuner.errors import DataError, Problem


def entries(count: int) -> dict[str, dict[str, torch.Tensor]]:
    return {f"key{number}": {"mean": torch.full((2, 3), float(number))} for number in range(count)}


def flipped(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.slow
def test_bits_that_flip_in_the_index_cost_no_entry_and_give_none_of_another(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    with TensorStore(whole) as store:
        store.put_many(entries(12))
        store.note_complete("all", 12)
    data, rng = (whole / INDEX_NAME).read_bytes(), random.Random(3)
    for number in range(80):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        (folder / INDEX_NAME).write_bytes(flipped(data, rng))
        with TensorStore(folder) as store:
            # A start that believes the index, as one does whose cache is complete, and asks for each entry.
            for key, tensors in entries(12).items():
                assert torch.equal(store.get(key)["mean"], tensors["mean"])
            assert store.missing(entries(13)) == ["key12"]
            store.put_many({"key12": entries(13)["key12"]})
            assert torch.equal(store.get("key12")["mean"], torch.full((2, 3), 12.0))
            assert store.verify() == []
        assert not (folder / QUARANTINE).exists()  # no shard was taken for damaged
        shutil.rmtree(folder)


def test_an_index_that_another_program_holds_is_no_damage(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("simpletuner.cache.index._BUSY_SECONDS", 0.0)
    with TensorStore(tmp_path) as store:
        store.put_many(entries(2))
        with contextlib.closing(sqlite3.connect(tmp_path / INDEX_NAME)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            with pytest.raises(DataError) as caught:
                store.note_complete("all", 2)
        assert caught.value.problems == [
            Problem(
                "the index of the cache cannot be used: database is locked",
                file=str(tmp_path / INDEX_NAME),
                fix="free some disk space, or end the program that holds it; what was written stays",
            )
        ]
        store.note_complete("all", 2)
        assert (store.complete("all"), store.complete("others")) == (2, None)
        [shard] = tmp_path.glob("shard-*")
        size = shard.stat().st_size
        assert store.stats() == StoreStats(2, 1, size)
        assert store.shards_of(["key1"]) == {shard.name: {"key0", "key1"}}
        assert store.shards_of(["none"]) == {}
        shard.unlink()
        assert (store.complete("all"), store.keys(), store.stats()) == (None, [], StoreStats(0, 0, 0))


def shard_of(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A file with a header of safetensors, whatever that says."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def header_of(offsets: list[int], **metadata: str) -> dict[str, object]:
    ours = {"format": "simpletuner-cache", "version": "1", "digests": '{"k": "abc"}', **metadata}
    return {"__metadata__": ours, "k/mean": {"dtype": "F32", "shape": [2], "data_offsets": offsets}}


def test_a_shard_is_read_from_its_header_alone(tmp_path: Path) -> None:
    """Of a file that was cut short too: what is missing is found out when an entry is read."""
    header = header_of([4, 12])
    path = shard_of(tmp_path / "a", header)
    start = 8 + len(json.dumps(header))
    entry = Entry("abc", (TensorPlace("mean", "F32", (2,), start + 4, start + 12),))
    assert read_entries(path) == {"k": entry}
    assert entry.num_bytes == 8
    assert Entry.from_json(entry.to_json()) == entry
    assert entry.to_json() == f'["abc",[["mean","F32",[2],{start + 4},{start + 12}]]]'


@pytest.mark.parametrize(
    ("header", "length", "reason"),
    [
        (header_of([0, 8]), 1, "has a damaged header: it does not hold the header whose length it gives"),
        (header_of([0, 8]), 9999, "has a damaged header: it does not hold the header whose length it gives"),
        (b"{", 1, "has a damaged header: it does not hold the header whose length it gives"),
        (b"{]", None, "has a damaged header: "),
        ([1], None, "has a damaged header: its header is not a JSON object"),
        ({}, None, "has no header of this cache"),
        ({"__metadata__": "x"}, None, "has no header of this cache"),
        (header_of([0, 8], format="pt"), None, "has no header of this cache"),
        (header_of([-1, 8]), None, "has a damaged header$"),
        (header_of([8, 0]), None, "has a damaged header$"),
        (header_of([0, 8], digests="{}"), None, "has a damaged header: it has no k"),
        (header_of([0, 8], version="one"), None, "has a damaged header: invalid literal"),
        (header_of([0, 8, 9]), None, "has a damaged header: too many values"),
    ],
)
def test_a_header_that_is_none_of_a_shard_is_damaged(tmp_path: Path, header, length, reason: str) -> None:
    path = shard_of(tmp_path / "a", header, bytes(8), length)
    with pytest.raises(DamagedShard, match=f"^{re.escape(str(path))} {reason}"):
        read_entries(path)


def test_a_shard_of_a_newer_version_is_left_alone(tmp_path: Path) -> None:
    path = shard_of(tmp_path / "a", header_of([0, 8], version="2"), bytes(8))
    with pytest.raises(DataError) as caught:
        read_entries(path)
    assert caught.value.problems == [
        Problem(
            "was written in cache format 2",
            file=str(path),
            allowed="formats up to 1",
            fix="use a newer version of simpletuner, or another cache folder",
        )
    ]


def test_a_store_clears_up_after_a_writer_that_died(tmp_path: Path) -> None:
    half = tmp_path / f".tmp-{tempnames.host_digest()}-{os.getpid()}-1-01234567"
    half.write_bytes(b"half a shard")
    with TensorStore(tmp_path) as store:
        assert not half.exists()
        assert store.keys() == []


def test_a_new_index_waits_for_the_disk_once(tmp_path, monkeypatch):
    statements = []
    connect = sqlite3.connect

    def traced(*arguments, **named):
        database = connect(*arguments, **named)
        database.set_trace_callback(statements.append)
        return database

    monkeypatch.setattr(sqlite3, "connect", traced)
    TensorStore(tmp_path).close()
    begin, commit = statements.index("BEGIN IMMEDIATE"), statements.index("COMMIT")
    created = [at for at, each in enumerate(statements) if each.startswith("CREATE")]
    assert len(created) == 4
    assert begin < min(created)
    assert max(created) < commit
    assert statements.count("COMMIT") == 1
