"""Remembered digests of files: an unchanged file is read once, a changed one again, damage costs no run."""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from simpletuner.data import digests
from simpletuner.data.digests import DigestMemo


def _old_file(path, content: bytes):
    """A file old enough to be remembered."""
    path.write_bytes(content)
    os.utime(path, ns=(10**9 + 1, 10**9 + 1))
    time.sleep(0.06)
    return path


@pytest.fixture
def reads(monkeypatch):
    """Paths whose bytes were really read."""
    seen = []
    real = digests.file_digest

    def counting(path):
        seen.append(str(path))
        return real(path)

    monkeypatch.setattr(digests, "file_digest", counting)
    return seen


def test_an_unchanged_file_is_read_once_even_after_reopening(tmp_path, reads):
    file = _old_file(tmp_path / "a", b"abc")
    with DigestMemo(tmp_path / "memo.sqlite") as memo:
        assert memo.digest(file) == hashlib.sha256(b"abc").hexdigest()
        assert memo.digest(file) == hashlib.sha256(b"abc").hexdigest()
    with DigestMemo(tmp_path / "memo.sqlite") as memo:
        assert memo.digest(file) == hashlib.sha256(b"abc").hexdigest()
    assert reads == [str(file)]


def test_a_change_of_same_size_and_restored_mtime_is_found(tmp_path):
    file = _old_file(tmp_path / "a", b"abc")
    stat = file.stat()
    with DigestMemo(tmp_path / "memo.sqlite") as memo:
        memo.digest(file)
        file.write_bytes(b"xyz")
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
        assert memo.digest(file) == hashlib.sha256(b"xyz").hexdigest()


def test_a_file_changed_just_now_is_not_remembered(tmp_path, reads):
    file = tmp_path / "a"
    file.write_bytes(b"abc")
    just_now = time.time() + 60  # still just now where this test has to wait for the machine
    os.utime(file, (just_now, just_now))
    with DigestMemo(tmp_path / "memo.sqlite") as memo:
        memo.digest(file)
        memo.digest(file)
    assert len(reads) == 2


def test_a_damaged_memory_is_made_again(tmp_path, reads):
    file = _old_file(tmp_path / "a", b"abc")
    database = tmp_path / "memo.sqlite"
    database.write_bytes(b"this is no database" * 100)
    for _ in range(2):
        with DigestMemo(database) as memo:
            assert memo.digest(file) == hashlib.sha256(b"abc").hexdigest()
    assert len(reads) == 1


def test_a_memory_damaged_inside_costs_a_read_and_no_error(tmp_path):
    files = [_old_file(tmp_path / f"{i}", b"%d" % i) for i in range(3)]
    database = tmp_path / "memo.sqlite"
    with DigestMemo(database) as memo:
        for file in files:
            memo.digest(file)
    data = bytearray(database.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    database.write_bytes(data)
    with DigestMemo(database) as memo:
        assert [memo.digest(file) for file in files] == [hashlib.sha256(b"%d" % i).hexdigest() for i in range(3)]


def test_without_a_place_to_write_the_memory_lasts_as_long_as_the_object(tmp_path, reads):
    file = _old_file(tmp_path / "a", b"abc")
    with DigestMemo("/proc/no/such/place/memo.sqlite") as memo:
        assert memo.digest(file) == memo.digest(file)
    assert len(reads) == 1


def test_threads_and_a_second_memo_share_one_database(tmp_path):
    files = [tmp_path / f"{i}" for i in range(200)]
    for i, file in enumerate(files):
        file.write_bytes(b"%d" % i)
    expected = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(200)]
    time.sleep(0.06)
    with DigestMemo(tmp_path / "m") as first, DigestMemo(tmp_path / "m") as second, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(first.digest, files)) == expected
        assert list(pool.map(second.digest, files)) == expected


def test_inodes_with_the_top_bit_fit_into_the_database():
    assert digests._signed((1 << 64) - 1) == -1
    assert digests._signed(5) == 5


def test_a_file_is_remembered_when_it_is_older_than_the_tick_of_its_times(monkeypatch) -> None:
    now = 1_000_000_000.5
    monkeypatch.setattr(digests.time, "time", lambda: now)

    def is_settled(age: float, part_of_a_second: int) -> bool:
        stat = SimpleNamespace(st_mtime=now - age, st_ctime=now - age, st_mtime_ns=part_of_a_second)
        return digests._has_settled(stat)

    assert [is_settled(age, 5) for age in (0.0, 0.04, 0.06)] == [False, False, True]
    just_copied = SimpleNamespace(st_mtime=now - 99, st_ctime=now, st_mtime_ns=5)
    assert not digests._has_settled(just_copied), "with the time of its source"
    # Whole seconds are a sign of coarse time stamps.
    assert [is_settled(age, 3_000_000_000) for age in (0.06, 1.9, 2.1)] == [False, False, True]


def test_bits_that_flip_in_the_memory_never_give_another_digest(tmp_path):
    files = [_old_file(tmp_path / name, name.encode()) for name in "abcdefgh"]
    with DigestMemo(tmp_path / "memo.sqlite") as memo:
        expected = [memo.digest(file) for file in files]
    whole, rng = (tmp_path / "memo.sqlite").read_bytes(), random.Random(3)
    assert all(digest.encode() in whole for digest in expected)
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5, 30))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "memo.sqlite").write_bytes(data)
        for _ in range(2):
            with DigestMemo(tmp_path / "memo.sqlite") as memo:
                assert [memo.digest(file) for file in files] == expected


def test_a_digest_whose_row_was_changed_is_read_again(tmp_path, reads):
    file = _old_file(tmp_path / "a", b"abc")
    with DigestMemo(tmp_path / "memo.sqlite") as memo:
        memo.digest(file)
    database = sqlite3.connect(tmp_path / "memo.sqlite")
    with database:
        database.execute("UPDATE digests SET digest = replace(digest, 'ba78', 'ba79')")
    database.close()
    with DigestMemo(tmp_path / "memo.sqlite") as memo:
        assert memo.digest(file) == hashlib.sha256(b"abc").hexdigest()
    assert reads == [str(file)] * 2


def test_a_memory_that_is_closed_answers_no_more(tmp_path):
    file = _old_file(tmp_path / "a", b"abc")
    with DigestMemo(tmp_path / "memo.sqlite") as memo:
        memo.digest(file)
    with pytest.raises(sqlite3.ProgrammingError, match="closed database"):
        memo._database.execute("SELECT 1")
