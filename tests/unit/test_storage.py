"""The commit protocol: a kill or a full disk at any operation leaves the old file or the new one, whole."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from simpletuner import storage, tempnames
from simpletuner.errors import EXIT_DATA, DataError

KILL_POINTS = Path(__file__).parent.parent / "kill_points.py"


def _commit(path: Path, text: str = "one") -> None:
    with storage.commit_dir(path, {"step": 1}) as folder:
        storage.write_bytes(folder / "data.txt", text.encode())
        storage.save_tensors(folder / "weights.safetensors", {"weight": torch.arange(6.0)})


def _hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "fewest"), [("checkpoints", 55), ("store", 12)])
def test_a_kill_at_any_operation_leaves_the_old_or_the_new(tmp_path, scenario, fewest):
    done = subprocess.run(
        [sys.executable, KILL_POINTS, scenario, tmp_path], capture_output=True, text=True, check=True, timeout=300
    )
    result = json.loads(done.stdout)
    assert result["wrong"] == []
    assert result["num_kills"] >= fewest


def _fill_disk_at(monkeypatch: pytest.MonkeyPatch, operation: int, persists: bool) -> list[str]:
    """Let the `operation`-th I/O operation (and all later ones) find a full disk; returns the growing list of them."""
    seen: list[str] = []

    def step(name: str) -> None:
        seen.append(name)
        if len(seen) == operation or (persists and len(seen) > operation):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_step", step)
    return seen


@pytest.mark.parametrize("persists", [False, True])
def test_a_full_disk_at_any_operation_is_reported_and_leaves_the_old_or_the_new(tmp_path, monkeypatch, persists):
    final = tmp_path / "checkpoint"
    _commit(final, "old")
    for operation in range(1, 100):
        with monkeypatch.context() as patch:
            seen = _fill_disk_at(patch, operation, persists)
            try:
                _commit(final, "new")
                error = None
            except DataError as caught:
                error = caught
        tempnames.clean_stale(tmp_path)
        assert storage.verify_dir(final) == []
        assert (final / "data.txt").read_text() in ("old", "new")
        if len(seen) < operation:
            break
        assert error is not None
        assert error.exit_code == EXIT_DATA
        assert f"{final}: cannot be written: the disk is full" in str(error)
        storage.remove_dir(final)
        _commit(final, "old")
    assert error is None
    assert operation > 15
    assert (final / "data.txt").read_text() == "new"


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(name: str) -> None:
        if name == "fsync":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_step", full)
    with pytest.raises(DataError, match="disk is full"):
        storage.write_bytes(tmp_path / "a", b"1")
    with pytest.raises(DataError, match="disk is full"):
        storage.save_tensors(tmp_path / "b", {"weight": torch.ones(2)})
    with pytest.raises(DataError, match="disk is full"):
        _commit(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_the_error_that_safetensors_wraps_is_reported_as_well(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*args: object) -> None:
        raise SafetensorError('Error while serializing: I/O error: No space left on device (os error 28) at path "x"')

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DataError, match="disk is full"):
        storage.save_tensors(tmp_path / "b", {"weight": torch.ones(2)})


def test_an_error_of_the_caller_passes_and_leaves_the_old_folder(tmp_path):
    _commit(tmp_path / "a", "old")

    def fail() -> None:
        with storage.commit_dir(tmp_path / "a") as folder:
            (folder / "data.txt").write_text("new")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (tmp_path / "a" / "data.txt").read_text() == "old"
    assert _hidden(tmp_path) == []


def test_a_refusal_elsewhere_is_not_blamed_on_the_folder(tmp_path):
    with pytest.raises(PermissionError), storage.commit_dir(tmp_path / "a"):
        raise PermissionError(errno.EACCES, "Permission denied", "/somewhere/else")


def test_the_manifest_names_every_file_with_its_sha256(tmp_path):
    with storage.commit_dir(tmp_path / "a", {"global_step": 7}) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_bytes(b"abc")
    manifest = storage.read_manifest(tmp_path / "a")
    # sha256 of "abc" as FIPS 180-2 gives it, appendix B.1.
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert manifest.files == {"sub/file": (3, sha256)}
    assert manifest.metadata == {"global_step": 7}


def test_metadata_may_be_filled_in_while_the_folder_is_written(tmp_path):
    metadata = {}
    with storage.commit_dir(tmp_path / "a", metadata):
        metadata["loss"] = 0.5
    assert storage.read_manifest(tmp_path / "a").metadata == {"loss": 0.5}


@pytest.mark.parametrize("full", [True, False])
def test_a_flipped_bit_a_cut_and_a_missing_file_are_found(tmp_path, full):
    _commit(tmp_path / "a")
    assert storage.verify_dir(tmp_path / "a", full) == []
    weights, text = tmp_path / "a" / "weights.safetensors", tmp_path / "a" / "data.txt"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    text.write_bytes(text.read_bytes()[:-1])
    problems = storage.verify_dir(tmp_path / "a", full)
    assert len(problems) == 2
    assert "it has 2 bytes, not the 3 bytes that were written" in problems[0]
    assert "sha256" in problems[1]
    text.unlink()
    assert "cannot be read" in storage.verify_dir(tmp_path / "a", full)[0]


def test_the_quick_check_does_not_read_large_files_and_the_full_one_does(tmp_path):
    with storage.commit_dir(tmp_path / "a") as folder:
        (folder / "large").write_bytes(bytes(2 << 20))
    with (tmp_path / "a" / "large").open("r+b") as file:
        file.write(b"\x01")
    assert storage.verify_dir(tmp_path / "a", full=False) == []
    assert len(storage.verify_dir(tmp_path / "a")) == 1


@pytest.mark.parametrize(("old", "new"), [(b'"size": 3', b'"size": 4'), (b'"step": 1', b'"step": 2'), (b"{", b"[")])
def test_a_damaged_manifest_is_found(tmp_path, old, new):
    _commit(tmp_path / "a")
    manifest = tmp_path / "a" / storage.MANIFEST
    assert old in manifest.read_bytes()
    manifest.write_bytes(manifest.read_bytes().replace(old, new, 1))
    assert len(storage.verify_dir(tmp_path / "a")) == 1


@pytest.mark.parametrize("metadata", [None, 5, [1], "text"])
def test_a_manifest_whose_metadata_is_no_object_is_damaged(tmp_path, metadata):
    with storage.commit_dir(tmp_path / "a"):
        pass
    manifest = tmp_path / "a" / storage.MANIFEST
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"metadata": metadata}))
    with pytest.raises(DataError, match="damaged"):
        storage.read_manifest(tmp_path / "a")


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret"])
def test_a_manifest_that_names_files_elsewhere_is_damaged(tmp_path, name):
    (tmp_path / "secret").touch()
    manifest = storage.Manifest({name: (0, hashlib.sha256(b"").hexdigest())}, {})
    (tmp_path / "a").mkdir()
    storage.write_json(tmp_path / "a" / storage.MANIFEST, manifest.to_json())
    assert ["does not lie in the folder" in each for each in storage.verify_dir(tmp_path / "a")] == [True]


def test_a_pipe_in_place_of_a_file_is_named_and_not_waited_for(tmp_path):
    with storage.commit_dir(tmp_path / "a") as folder:
        (folder / "weights").touch()
    (tmp_path / "a" / "weights").unlink()
    os.mkfifo(tmp_path / "a" / "weights")
    assert storage.verify_dir(tmp_path / "a") == [f"{tmp_path}/a/weights is not a regular file"]


def test_a_folder_without_manifest_does_not_count_and_stray_files_do_no_harm(tmp_path):
    (tmp_path / "a").mkdir()
    assert "manifest.json" in storage.verify_dir(tmp_path / "a")[0]
    _commit(tmp_path / "b")
    (tmp_path / "b" / ".DS_Store").write_text("x")
    assert storage.verify_dir(tmp_path / "b") == []


def test_a_folder_of_a_newer_format_is_reported_as_such(tmp_path):
    _commit(tmp_path / "a")
    manifest = tmp_path / "a" / storage.MANIFEST
    manifest.write_text(manifest.read_text().replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(DataError, match="format 9"):
        storage.read_manifest(tmp_path / "a")


def test_committing_equal_content_again_keeps_the_folder_that_is_there(tmp_path):
    _commit(tmp_path / "a")
    inode = (tmp_path / "a").stat().st_ino
    _commit(tmp_path / "a")
    assert (tmp_path / "a").stat().st_ino == inode
    _commit(tmp_path / "a", "two")
    assert (tmp_path / "a" / "data.txt").read_text() == "two"
    assert _hidden(tmp_path) == []


def test_a_damaged_folder_is_replaced_by_a_commit_of_the_same_content(tmp_path):
    _commit(tmp_path / "a")
    (tmp_path / "a" / "data.txt").write_text("oops")
    _commit(tmp_path / "a")
    assert storage.verify_dir(tmp_path / "a") == []


def test_same_tensors_and_metadata_give_the_same_bytes_with_the_mode_of_the_umask(tmp_path):
    tensors = {"b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.bfloat16)}
    metadata = {f"key{i}": f"wert ü {i}\n" for i in range(12)}
    previous = os.umask(0o027)
    try:
        for i in range(4):
            storage.save_tensors(tmp_path / f"{i}", tensors, metadata)
    finally:
        os.umask(previous)
    assert len({storage.file_digest(tmp_path / f"{i}") for i in range(4)}) == 1
    assert (tmp_path / "0").stat().st_mode & 0o777 == 0o640
    loaded = load_file(tmp_path / "0")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_file_is_readable_as_the_umask_says_and_a_transposed_tensor_is_written_in_rows(tmp_path):
    before = os.umask(0o027)
    try:
        storage.write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640
    matrix = torch.arange(6.0).view(2, 3)
    storage.save_tensors(tmp_path / "a.safetensors", {"weight": matrix.T})
    assert load_file(tmp_path / "a.safetensors")["weight"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_of_a_link_to_a_folder_the_link_alone_is_removed(tmp_path):
    _commit(tmp_path / "disk" / "not there" / "checkpoint")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "not there" / "checkpoint")
    storage.remove_dir(tmp_path / "link")
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]
    assert storage.verify_dir(tmp_path / "disk" / "not there" / "checkpoint") == []
    left = tmp_path / _dead_name("trash")
    left.symlink_to(tmp_path / "disk")
    assert tempnames.clean_stale(tmp_path) == [left]
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_json_without_a_value_for_nan_is_refused(tmp_path):
    with pytest.raises(ValueError):
        storage.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_no_text_survives_json(tmp_path):
    """As Python gives a name that is not UTF-8: with a half surrogate."""
    storage.write_json(tmp_path / "a.json", {"output_dir": "runs/\udcff"})
    assert storage.read_json(tmp_path / "a.json") == {"output_dir": "runs/\udcff"}
    with storage.commit_dir(tmp_path / "folder", {"name": "\udcff"}):
        pass
    assert storage.verify_dir(tmp_path / "folder") == []
    assert storage.read_manifest(tmp_path / "folder").metadata == {"name": "\udcff"}


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path / "a.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(DataError, match=r"a\.json:[23]"):
        storage.read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match="cannot be read"):
        storage.read_json(tmp_path / "missing.json")


def _dead_name(prefix: str, end: str = "") -> str:
    """A left-over of a process that cannot be there: its pid began to run a day earlier than it did."""
    return f".{prefix}-{tempnames.host_digest()}-{os.getpid()}-{int(time.time()) - 86400}-01234567{end}"


def test_sweep_clears_what_the_dead_left_and_nothing_else(tmp_path):
    (tmp_path / _dead_name("tmp")).mkdir()
    (tmp_path / _dead_name("trash")).write_text("x")
    _commit(tmp_path / "replaced")
    (tmp_path / _dead_name("aside", "-replaced")).mkdir()
    mine = tempnames.new_sibling(tmp_path / "a", "tmp")
    mine.mkdir()
    foreign = tmp_path / _dead_name("tmp").replace(tempnames.host_digest(), "0" * 8)
    foreign.mkdir()
    user = tmp_path / ".tmp-of-the-user"
    user.mkdir()
    assert len(tempnames.clean_stale(tmp_path)) == 3
    assert sorted(tmp_path.iterdir()) == sorted([mine, foreign, user, tmp_path / "replaced"])
    os.utime(foreign, (0, 0))
    assert tempnames.clean_stale(tmp_path) == [foreign]


def test_sweep_puts_back_what_was_moved_aside_and_not_replaced(tmp_path):
    _commit(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1").rename(tmp_path / _dead_name("aside", "-checkpoint-1"))
    tempnames.clean_stale(tmp_path)
    assert storage.verify_dir(tmp_path / "checkpoint-1") == []


def test_a_second_process_is_reported_who_holds_the_lock(tmp_path):
    lock = tmp_path / "run" / "lock"
    code = (
        "import sys; from simpletuner.storage import exclusive_lock\n"
        f"with exclusive_lock({str(lock)!r}, 'training into run'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(DataError, match=rf"process {other.pid} on .*already"),
            storage.exclusive_lock(lock, "training into run"),
        ):
            pass
        other.kill()
        other.wait()
        with storage.exclusive_lock(lock, "training into run"):
            pass


def test_too_little_space_is_reported_in_bytes_before_anything_is_written(tmp_path):
    storage.require_free_space(tmp_path / "not" / "there", 1, "a test")
    with pytest.raises(DataError, match=r"a test needs 1048576\.0 TiB, and only [\d.]+ [KMGT]iB are free"):
        storage.require_free_space(tmp_path / "not" / "there", 1 << 60, "a test")


def test_a_writer_that_opens_files_itself_gets_all_of_them_committed(tmp_path):
    with storage.replacing_file(tmp_path / "adapter.safetensors") as temporary:
        temporary.write_text("weights")
        temporary.with_name("config.json").write_text("{}")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "adapter.safetensors": "weights",
        "config.json": "{}",
    }


def test_a_file_of_no_tensors_is_sound(tmp_path: Path):
    storage.save_tensors(tmp_path / "empty.safetensors", {})
    assert load_file(tmp_path / "empty.safetensors") == {}


def test_linked_files_are_the_same_ones_but_the_manifest(tmp_path):
    with storage.commit_dir(tmp_path / "a") as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        (folder / "sub" / "manifest.json").write_text("{}")
    (tmp_path / "b").mkdir()
    storage.link_files(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b/sub/file").stat().st_ino == (tmp_path / "a/sub/file").stat().st_ino
    assert (tmp_path / "b/sub/manifest.json").is_file()
    assert not (tmp_path / "b/manifest.json").exists()


def test_where_files_cannot_be_linked_they_are_copied(tmp_path, monkeypatch):
    _commit(tmp_path / "a")
    (tmp_path / "b").mkdir()

    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    storage.link_files(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b/data.txt").read_text() == "one"


def test_content_is_written_whole_however_little_the_system_takes_at_once(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data)[:3]))
    storage.write_bytes(tmp_path / "a", b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


@pytest.mark.parametrize("bytes_missing", [-1, 0, 1])
def test_just_enough_space_is_enough(tmp_path, monkeypatch, bytes_missing):
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    if bytes_missing > 0:
        with pytest.raises(DataError, match=r"needs 1001 bytes, and only 1000 bytes are free"):
            storage.require_free_space(tmp_path, 1000 + bytes_missing, "a test")
    else:
        storage.require_free_space(tmp_path, 1000 + bytes_missing, "a test")


def test_the_quick_check_reads_files_up_to_a_mebibyte(tmp_path):
    with storage.commit_dir(tmp_path / "a") as folder:
        (folder / "exact").write_bytes(bytes(1 << 20))
        (folder / "larger").write_bytes(bytes((1 << 20) + 1))
    for name in ("exact", "larger"):
        with (tmp_path / "a" / name).open("r+b") as file:
            file.write(b"\x01")
    assert [Path(line.split(" is damaged")[0]).name for line in storage.verify_dir(tmp_path / "a", full=False)] == [
        "exact"
    ]


def test_a_lock_names_its_holder_and_is_free_afterwards(tmp_path):
    with storage.exclusive_lock(tmp_path / "lock", "training into run"):
        held = json.loads((tmp_path / "lock.holder").read_text())
        assert (held["pid"], held["purpose"]) == (os.getpid(), "training into run")
    assert not (tmp_path / "lock.holder").exists()
    with storage.exclusive_lock(tmp_path / "lock", "again"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM])
def test_what_a_disk_refuses_is_an_error_of_the_data_and_names_the_file(tmp_path, number):
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "a"))), storage.disk_errors(tmp_path / "a"):
        raise OSError(number, "refused", str(tmp_path / "a"))


def test_another_machine_s_left_over_is_left_for_a_day(tmp_path):
    foreign = tmp_path / _dead_name("tmp").replace(tempnames.host_digest(), "0" * 8)
    foreign.mkdir()
    for hours, stays in ((23, True), (25, False)):
        moment = time.time() - hours * 3600
        os.utime(foreign, (moment, moment))
        tempnames.clean_stale(tmp_path)
        assert foreign.exists() == stays


def test_a_process_that_began_when_the_name_says_is_alive_and_any_other_is_dead():
    now = tempnames._start_second(os.getpid())
    for difference, alive in ((0, True), (2, True), (-2, True), (3, False), (-3, False)):
        name = f".tmp-{tempnames.host_digest()}-{os.getpid()}-{now + difference}-01234567"
        assert tempnames.parse_name(name).is_owner_alive(Path(name)) == alive
    assert tempnames.parse_name(".tmp-x") is None
    assert tempnames.parse_name(f".aside-{'0' * 8}-1-2-01234567-my-name").final_name == "my-name"
    assert tempnames.parse_name(f".trash-{'0' * 8}-1-2-01234567-my-name").final_name is None


def test_what_a_living_process_writes_is_not_looked_into(tmp_path):
    """A folder that is being written may hold what looks like a leftover of the dead: it is part of the folder."""
    mine = tempnames.new_sibling(tmp_path / "a", "tmp")
    (mine / "sub" / _dead_name("tmp")).mkdir(parents=True)
    (tmp_path / "runs" / "one" / _dead_name("tmp")).mkdir(parents=True)
    assert len(tempnames.clean_stale_tree(tmp_path)) == 1
    assert (mine / "sub" / _dead_name("tmp")).is_dir()
    assert list((tmp_path / "runs" / "one").iterdir()) == []


def test_a_manifest_has_one_form_whatever_the_order_of_its_files():
    first, second = ({name: (1, "a") for name in names} for names in ("ba", "ab"))
    assert list(storage.Manifest(first).to_json()["files"]) == ["a", "b"]
    assert storage.Manifest(first).to_json() == storage.Manifest(second).to_json()


@pytest.mark.parametrize("change", [b"", b"one and more"])
def test_a_file_that_shrank_or_grew_is_found(tmp_path, change):
    _commit(tmp_path / "a")
    (tmp_path / "a" / "data.txt").write_bytes(change)
    assert f"{len(change)} bytes, not the 3 bytes" in storage.verify_dir(tmp_path / "a")[0]


def test_a_tensor_file_has_exactly_the_length_that_its_header_says(tmp_path):
    path = tmp_path / "a.safetensors"
    storage.save_tensors(path, {"first": torch.zeros(4), "second": torch.zeros(4)}, {"of": "a test"})
    assert storage.read_tensor_metadata(path) == {"of": "a test"}
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-16], whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is not a complete safetensors file"):
            storage.read_tensor_metadata(path)
