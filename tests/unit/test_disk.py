"""What the operating system refuses is one message with exit code 3, whatever its number."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import socket
import sqlite3
import ssl
import stat
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch

from simpletuner import storage, tempnames
from simpletuner.cli.program import main
from simpletuner.disk import (
    DiskError,
    copy_in_memory,
    disk_error,
    disk_errors,
    errno_of,
    is_damage,
    is_writable,
    reported_as_disk_errors,
)
from simpletuner.errors import EXIT_DATA, DataError, Problem
from simpletuner.tempnames import StaleName, new_sibling, parse_name

NETWORK = {errno.EPIPE, errno.ESHUTDOWN, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET}


@pytest.mark.parametrize("number", sorted(set(errno.errorcode) - NETWORK))
def test_every_errno_of_a_write_is_reported_with_its_file(tmp_path, monkeypatch, number):
    def refuse(name):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage, "_step", refuse)
    with pytest.raises(DiskError) as caught:
        storage.write_bytes(tmp_path / "a", b"1")
    assert caught.value.exit_code == EXIT_DATA
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: cannot be written: ")
    assert "\n  fix: " in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError(errno.ECONNRESET, "reset"),
        ssl.SSLError(errno.EPERM, "a certificate, whose number is none of a disk"),
        socket.gaierror(errno.ENOENT, "no such host"),
        OSError("no number"),
        ValueError("x"),
    ],
)
def test_what_is_no_disk_is_no_disk_error(error):
    assert disk_error(error) is None
    with pytest.raises(type(error)), reported_as_disk_errors():
        raise error


def test_a_cleanup_that_fails_too_does_not_hide_the_first_error(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    monkeypatch.setattr("pathlib.Path.unlink", lambda *a, **k: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
    with pytest.raises(DiskError, match="the disk reports an error"):
        storage.write_bytes(tmp_path / "a", b"1")


def test_a_disk_without_permissions_that_cannot_sync_folders_serves(tmp_path, monkeypatch):
    """exFAT answers EPERM to a mode that it cannot keep, some network mounts EINVAL to the fsync of a folder."""
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(descriptor)

    def set_mode(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "chmod", set_mode)
    storage.save_tensors(tmp_path / "one.safetensors", {"a": torch.ones(2)})
    storage.write_json(tmp_path / "one.json", [1])
    with storage.commit_dir(tmp_path / "checkpoint-1") as folder:
        storage.write_json(folder / "two.json", [2])
    assert storage.read_json(tmp_path / "one.json") == [1]
    assert storage.verify_dir(tmp_path / "checkpoint-1") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-1", "one.json", "one.safetensors"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_does_not_reach_the_disk_is_reported(tmp_path, monkeypatch, number):
    fsync = os.fsync

    def sync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(DataError):
        storage.write_json(tmp_path / "one.json", [1])


def test_a_forked_process_writes_under_its_own_name(tmp_path, monkeypatch):
    monkeypatch.setattr(tempnames, "_start_second", lambda pid: pid)
    tempnames._own_start_second.cache_clear()
    mine = tempnames.new_sibling(tmp_path / "a", "tmp")
    reading, writing = os.pipe()
    if not (child := os.fork()):
        os.write(writing, tempnames.new_sibling(tmp_path / "a", "tmp").name.encode())
        os._exit(0)
    os.waitpid(child, 0)
    names = [parse_name(name) for name in (mine.name, os.read(reading, 200).decode())]
    assert [(name.pid, name.start_second) for name in names] == [(os.getpid(), os.getpid()), (child, child)]
    tempnames._own_start_second.cache_clear()
    os.close(reading)
    os.close(writing)


def test_a_lock_is_held_on_a_disk_that_has_no_room_for_the_holder_s_name(tmp_path, monkeypatch):
    def refuse(name):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_step", refuse)
    entered = []
    with storage.exclusive_lock(tmp_path / ".lock", "training"):
        entered.append(True)
    assert entered


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), "/data/x: cannot be used: the disk is full"),
        (OSError(errno.ESTALE, "Stale file handle", "/data/x"), "/data/x: cannot be used: stale file handle"),
        (sqlite3.OperationalError("disk I/O error"), "a database of the cache cannot be used: disk I/O error"),
    ],
)
def test_the_program_ends_with_one_message_and_code_3(monkeypatch, capsys, error, words):
    monkeypatch.setattr("simpletuner.cli.program.app", lambda: (_ for _ in ()).throw(error))
    monkeypatch.setattr(sys, "argv", ["simpletuner", "train"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == EXIT_DATA
    reported = capsys.readouterr().err
    assert words in reported
    assert "Traceback" not in reported


def test_leftovers_of_another_machine_go_once_the_lock_is_held_in_all_folders_but_those_of_the_living_stay(
    tmp_path, monkeypatch
):
    folders = [tmp_path, tmp_path / "ema", tmp_path / "images" / "deep"]
    folders[-1].mkdir(parents=True)
    folders[1].mkdir()
    living = [new_sibling(folder / "x", "tmp") for folder in folders]
    with monkeypatch.context() as patched:
        patched.setattr("socket.gethostname", lambda: "another-machine")
        foreign = [new_sibling(folder / "x", "tmp") for folder in folders]
    for path in [*living, *foreign]:
        path.write_bytes(b"half")
    assert tempnames.clean_stale_tree(tmp_path) == []
    assert sorted(tempnames.clean_stale_tree(tmp_path, is_locked=True)) == sorted(foreign)
    assert all(path.exists() for path in living)


def test_a_database_is_damaged_where_its_content_is_at_fault_and_not_where_it_is_locked_or_full(tmp_path):
    def raised(statement, path=":memory:"):
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=0)) as database:
                database.execute(statement)
        except sqlite3.DatabaseError as error:
            return error
        return None

    (tmp_path / "text").write_text("no database" * 100)
    holder = sqlite3.connect(tmp_path / "locked")
    holder.execute("BEGIN EXCLUSIVE")
    assert is_damage(raised("SELECT * FROM a_table_whose_name_has_changed"))
    assert is_damage(raised("SELECT * FROM sqlite_master", tmp_path / "text"))
    assert is_damage(UnicodeDecodeError("utf-8", b"\xe5", 0, 1, "no text"))
    assert not is_damage(raised("CREATE TABLE a (b)", tmp_path / "locked"))
    assert not is_damage(raised("SELECT 1", tmp_path / "none" / "a"))
    holder.close()


@pytest.mark.parametrize(
    ("number", "may_pass"),
    [
        *[(number, True) for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE, errno.ETIMEDOUT)],
        *[(number, False) for number in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.EFBIG)],
    ],
)
def test_what_may_be_over_in_a_while_is_told_from_what_stays(number, may_pass):
    found = disk_error(OSError(number, "refused"))
    assert found is not None
    assert (found.number, found.may_pass) == (number, may_pass)


def test_the_number_is_read_from_the_text_of_safetensors_and_of_no_other():
    kind = type("SafetensorError", (Exception,), {})
    assert errno_of(kind("I/O error: No space left on device (os error 28)")) == errno.ENOSPC
    assert errno_of(kind("invalid header")) is None
    assert errno_of(ValueError("(os error 28)")) is None


def test_a_database_in_memory_has_the_content_of_the_file_or_nothing(tmp_path):
    path = tmp_path / "a ?#.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute("CREATE TABLE a AS SELECT 7 AS b")
    with contextlib.closing(copy_in_memory(path)) as copied:
        copied.execute("UPDATE a SET b = b + 1")
        assert copied.execute("SELECT b FROM a").fetchall() == [(8,)]
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT b FROM a").fetchall() == [(7,)]
    torn = tmp_path / "torn"
    torn.write_bytes(path.read_bytes().replace(b"CREATE TABLE a", b"CREATE TABBE a"))
    path.write_bytes(b"no database" * 500)
    for name in (path, torn, tmp_path / "none"):
        with contextlib.closing(copy_in_memory(name)) as empty:
            assert empty.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)


def test_a_database_in_memory_serves_all_threads_whatever_its_file_was(tmp_path):
    (tmp_path / "damaged").write_bytes(b"no database" * 500)
    with ThreadPoolExecutor(1) as pool:
        for name in ("damaged", "none"):
            with contextlib.closing(copy_in_memory(tmp_path / name)) as database:
                assert pool.submit(lambda opened: opened.execute("SELECT 1").fetchone(), database).result() == (1,)


def test_a_file_can_be_made_where_the_nearest_folder_that_is_there_can_be_written(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: (asked.append((path, mode)), path != tmp_path / "file")[1])
    assert is_writable(tmp_path / "not" / "there" / "a")
    assert asked == [(tmp_path, os.W_OK)]
    (tmp_path / "file").write_text("x")
    asked.clear()
    assert not is_writable(tmp_path / "file")
    assert asked == [(tmp_path / "file", os.W_OK)]


@pytest.mark.parametrize(
    ("number", "message", "fix"),
    [
        (errno.ENOSPC, "the disk is full", "free some space, then start again: what was committed before is untouched"),
        (errno.EDQUOT, "the disk quota is used up", "free some space, then start again: what was committed before is "
         "untouched"),
        (errno.EROFS, "the file system is read-only", "choose another folder, or make this one writable"),
        (errno.EACCES, "permission denied", "choose another folder, or make this one writable"),
        (errno.EPERM, "the operation is not permitted", "choose another folder, or make this one writable"),
        (errno.EMFILE, "too many files are open", "raise the limit in this shell: ulimit -n 65536"),
        (errno.ENFILE, "too many files are open on this machine", "end other programs, or raise fs.file-max"),
        (errno.ENAMETOOLONG, "the name is too long", "choose a shorter output_dir"),
        (errno.ESTALE, "stale file handle", "check the disk and its mount, then start again: what was committed before "
         "is untouched"),
    ],
)  # fmt: skip
def test_what_a_disk_refuses_has_words_and_a_fix_of_its_own(tmp_path, number, message, fix):
    found = disk_error(OSError(number, "refused", str(tmp_path / "a")))
    assert found.problems == [Problem(f"cannot be used: {message}", file=str(tmp_path / "a"), fix=fix)]
    named = disk_error(OSError(number, "refused", str(tmp_path / "a")), tmp_path / "b", "written")
    assert named.problems == [Problem(f"cannot be written: {message}", file=str(tmp_path / "b"), fix=fix)]
    assert disk_error(OSError(number, "refused")).problems[0].file is None
    assert disk_error(OSError(number, "refused", os.fsencode(tmp_path))).problems[0].file == str(tmp_path)


def test_a_database_that_cannot_be_used_names_its_file_and_the_key_of_its_folder(tmp_path):
    fix = "free some space on its disk and make its folder writable; it may be removed, and is then made again"
    found = disk_error(sqlite3.OperationalError("database is locked"), tmp_path / "a")
    assert found.problems == [
        Problem("a database of the cache cannot be used: database is locked", "cache_dir", str(tmp_path / "a"), fix=fix)
    ]
    assert (found.number, found.may_pass) == (None, False)


def test_only_what_happens_beside_a_file_is_told_as_its_own(tmp_path):
    """Of another folder the error stays what it is; inside of a folder that is being written its writer tells it."""
    (tmp_path / "own").mkdir()
    for place, kind in ((tmp_path / "own" / "b", DiskError), (tmp_path / "other", OSError)):
        with pytest.raises(kind), disk_errors(tmp_path / "own" / "a"):
            raise OSError(errno.ENOSPC, "full", str(place))
    inside = new_sibling(tmp_path / "own" / "folder", "tmp") / "a"
    with pytest.raises(OSError, match="full"), disk_errors(inside):
        raise OSError(errno.ENOSPC, "full", str(inside))


def test_a_left_over_tells_its_machine_process_kind_and_name(tmp_path):
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    second = int(psutil.Process().create_time())
    name = new_sibling(tmp_path / "my run", "aside").name
    assert re.fullmatch(rf"\.aside-{host}-{os.getpid()}-{second}-[0-9a-f]{{8}}-my run", name)
    assert parse_name(name) == StaleName(host, os.getpid(), second, "my run")
    name = new_sibling(tmp_path / "my run", "trash").name
    assert re.fullmatch(rf"\.trash-{host}-{os.getpid()}-{second}-[0-9a-f]{{8}}", name)
    assert parse_name(name) == StaleName(host, os.getpid(), second, None)
    assert parse_name(name + "-") is None
    assert parse_name("x" + name) is None


def test_what_another_machine_has_just_renamed_may_still_be_worked_on(tmp_path):
    foreign = StaleName("0" * 8, os.getpid(), 0, None)
    assert foreign.is_owner_alive(tmp_path / "gone")


def test_a_tensor_file_without_tensors_is_whole_and_one_that_is_missing_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    storage.save_tensors(path, {}, {"of": "an optimizer before its first step"})
    assert storage.read_tensor_metadata(path) == {"of": "an optimizer before its first step"}
    with pytest.raises(DataError, match=r"none\.safetensors: cannot be read: No such file"):
        storage.read_tensor_metadata(tmp_path / "none.safetensors")


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b"\xff", None])
def test_a_lock_makes_its_folder_and_is_held_whatever_its_holder_left_of_its_name(tmp_path, damage):
    lock = tmp_path / "not" / "there" / "lock"
    with storage.exclusive_lock(lock, "training"):
        holder = lock.with_name("lock.holder")
        holder.unlink() if damage is None else holder.write_bytes(damage)
        with (
            pytest.raises(DataError, match="training into a: another process already does this"),
            storage.exclusive_lock(lock, "training into a"),
        ):
            pass


def test_a_folder_counts_though_the_one_that_it_replaces_cannot_be_removed(tmp_path, monkeypatch):
    for text in ("old", "new"):
        monkeypatch.setattr("os.rmdir", lambda *given, **keys: (_ for _ in ()).throw(OSError(errno.EACCES, "no")))
        with storage.commit_dir(tmp_path / "folder") as folder:
            (folder / "a").write_text(text)
    assert (tmp_path / "folder" / "a").read_text() == "new"
    assert storage.verify_dir(tmp_path / "folder") == []


def test_no_file_stays_open_that_was_written_or_brought_to_the_disk(tmp_path):
    def write(name):
        storage.write_bytes(tmp_path / name, b"1")
        storage.save_tensors(tmp_path / f"{name}.safetensors", {}, {"of": "a test"})
        with storage.commit_dir(tmp_path / f"folder of {name}") as folder:
            (folder / "b").write_text("2")
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    assert write("first") == write("second") == write("third")
