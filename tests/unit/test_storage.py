from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simpletuner import leftovers, storage
from simpletuner.errors import EXIT_DATA, DataError

KILL_POINTS = Path(__file__).parent.parent / "kill_points.py"


def _commit(path: Path, text: str = "one") -> None:
    with storage.commit_dir(path, {"step": 1}) as folder:
        storage.write_bytes(folder / "data.txt", text.encode())
        storage.save_tensors(folder / "weights.safetensors", {"weight": torch.arange(6.0)})


def _hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "fewest"), [("checkpoints", 60), ("store", 12)])
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
def test_a_full_disk_at_any_operation_is_told_and_leaves_the_old_or_the_new(tmp_path, monkeypatch, persists):
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
        storage.sweep(tmp_path)
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


def test_the_error_that_safetensors_wraps_is_told_as_well(tmp_path, monkeypatch):
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
    assert "2 bytes, not 3" in problems[0]
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


def test_a_folder_without_manifest_does_not_count_and_stray_files_do_no_harm(tmp_path):
    (tmp_path / "a").mkdir()
    assert "manifest.json" in storage.verify_dir(tmp_path / "a")[0]
    _commit(tmp_path / "b")
    (tmp_path / "b" / ".DS_Store").write_text("x")
    assert storage.verify_dir(tmp_path / "b") == []


def test_a_folder_of_a_newer_format_is_told_as_such(tmp_path):
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


def test_json_without_a_value_for_nan_is_refused(tmp_path):
    with pytest.raises(ValueError):
        storage.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_broken_json_names_file_and_line(tmp_path):
    (tmp_path / "a.json").write_text('{\n"a": 1,\n}')
    with pytest.raises(DataError, match=r"a\.json:[23]"):
        storage.read_json(tmp_path / "a.json")
    with pytest.raises(DataError, match="cannot be read"):
        storage.read_json(tmp_path / "missing.json")


def _dead_name(prefix: str, end: str = "") -> str:
    """A left-over of a process that cannot be there: its pid began to run a day earlier than it did."""
    return f".{prefix}-{leftovers.host_digest()}-{os.getpid()}-{int(time.time()) - 86400}-01234567{end}"


def test_sweep_clears_what_the_dead_left_and_nothing_else(tmp_path):
    (tmp_path / _dead_name("tmp")).mkdir()
    (tmp_path / _dead_name("trash")).write_text("x")
    _commit(tmp_path / "replaced")
    (tmp_path / _dead_name("aside", "-replaced")).mkdir()
    mine = leftovers.new_sibling(tmp_path / "a", "tmp")
    mine.mkdir()
    foreign = tmp_path / _dead_name("tmp").replace(leftovers.host_digest(), "0" * 8)
    foreign.mkdir()
    user = tmp_path / ".tmp-of-the-user"
    user.mkdir()
    assert len(storage.sweep(tmp_path)) == 3
    assert sorted(tmp_path.iterdir()) == sorted([mine, foreign, user, tmp_path / "replaced"])
    os.utime(foreign, (0, 0))
    assert storage.sweep(tmp_path) == [foreign]


def test_sweep_puts_back_what_was_moved_aside_and_not_replaced(tmp_path):
    _commit(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1").rename(tmp_path / _dead_name("aside", "-checkpoint-1"))
    storage.sweep(tmp_path)
    assert storage.verify_dir(tmp_path / "checkpoint-1") == []


def test_a_second_process_is_told_who_holds_the_lock(tmp_path):
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


def test_too_little_space_is_told_in_bytes_before_anything_is_written(tmp_path):
    storage.require_free_space(tmp_path / "not" / "there", 1, "a test")
    with pytest.raises(DataError, match=r"a test needs 1,152,921,504,606,846,976 bytes, and only [\d,]+ are free"):
        storage.require_free_space(tmp_path / "not" / "there", 1 << 60, "a test")


def test_importing_storage_imports_no_torch():
    code = "import sys, simpletuner.storage; assert 'torch' not in sys.modules and 'safetensors' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


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
