"""What is damaged, or cannot be read now, is reported each time and never a fresh start."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from simpletuner import storage
from simpletuner.errors import ConfigError, DataError
from simpletuner.training.checkpoint import Checkpoints
from simpletuner.training.damage import why_unreadable


def folder_of(output: Path, step: int) -> Path:
    path = output / f"checkpoint-{step}"
    with storage.commit_dir(path, {"global_step": step}) as folder:
        storage.write_bytes(folder / "weights", b"some weights")
    return path


def damage(path: Path) -> None:
    (path / "weights").write_bytes(b"SOME weights")


def names(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if not path.name.startswith("."))


def make_newer(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))


def refuse_reading(monkeypatch, path: Path, number: int) -> None:
    opened = Path.open

    def refusing(self, *args, **keys):
        if self == path:
            raise OSError(number, os.strerror(number), str(path))
        return opened(self, *args, **keys)

    monkeypatch.setattr(Path, "open", refusing)
    monkeypatch.setattr(Path, "read_text", lambda self, **keys: refusing(self, encoding="utf-8").read())


def test_where_all_are_damaged_each_start_says_so_and_changes_nothing(tmp_path):
    for step in (2, 4, 6):
        damage(folder_of(tmp_path, step))
    for _ in range(3):
        with pytest.raises(ConfigError) as caught:
            Checkpoints(tmp_path, None).choose("latest")
        [problem] = caught.value.problems
        start = f"every checkpoint in {tmp_path} is damaged (3 of them): checkpoint-6: "
        assert problem.message.startswith(start)
        assert problem.message.endswith("; nothing was changed")
        assert problem.key == "resume_from_checkpoint"
        assert problem.allowed == "latest, a whole checkpoint's path, or none for a fresh start"
        way = "set resume_from_checkpoint=none: a fresh start, which deletes nothing"
        assert problem.fix == f"copy a whole checkpoint back, or {way}"
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_damaged_one_is_renamed_a_second_time_too_where_an_older_one_is_whole(tmp_path):
    folder_of(tmp_path, 2)
    for name in ("damaged-checkpoint-4", "damaged-checkpoint-4-2"):
        damage(folder_of(tmp_path, 4))
        path, (notice,) = Checkpoints(tmp_path, None).choose("latest")
        assert path == tmp_path / "checkpoint-2"
        assert notice.startswith("checkpoint-4 is damaged (")
        assert notice.endswith(f"); it was renamed to {name}")
    assert names(tmp_path) == ["checkpoint-2", "damaged-checkpoint-4", "damaged-checkpoint-4-2"]


@pytest.mark.parametrize("what", ["manifest.json", "weights"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
def test_one_that_the_disk_refuses_to_read_is_reported_each_time_and_nothing_is_renamed(
    tmp_path, monkeypatch, what, number
):
    folder_of(tmp_path, 2)
    newest = folder_of(tmp_path, 4)
    for _ in range(2):
        with monkeypatch.context() as patched:
            refuse_reading(patched, newest / what, number)
            with pytest.raises(DataError) as caught:
                Checkpoints(tmp_path, None).choose("latest")
        [problem] = caught.value.problems
        of_what = "" if what == "manifest.json" else f"{what}: "
        assert problem.message == f"cannot be read now: {of_what}{os.strerror(number)}; nothing was changed"
        assert (problem.key, problem.file) == ("resume_from_checkpoint", str(newest))
        way = "make it readable (its disk, permissions, or the newer version) and start again"
        back = ", or go on from an older one: resume_from_checkpoint=checkpoint-2"
        assert problem.fix == way + back
        assert caught.value.exit_code == 3
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert Checkpoints(tmp_path, None).choose("latest") == (newest, [])


def test_one_that_a_newer_version_wrote_is_left_alone(tmp_path):
    make_newer(folder_of(tmp_path, 4))
    for _ in range(2):
        with pytest.raises(DataError, match=r"a newer version of simpletuner wrote it \(format 99\)") as caught:
            Checkpoints(tmp_path, None).choose("latest")
        assert caught.value.problems[0].fix.endswith("start again")  # there is no older one
        assert names(tmp_path) == ["checkpoint-4"]
    folder_of(tmp_path, 2)
    assert Checkpoints(tmp_path, None).choose("checkpoint-2")[0] == tmp_path / "checkpoint-2"


def test_a_file_that_is_missing_is_damage(tmp_path):
    folder_of(tmp_path, 2)
    (folder_of(tmp_path, 4) / "weights").unlink()
    assert Checkpoints(tmp_path, None).choose("latest")[0] == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-2", "damaged-checkpoint-4"]


def test_one_that_is_damaged_and_cannot_be_renamed_is_reported_and_the_older_one_taken(tmp_path, monkeypatch):
    folder_of(tmp_path, 2)
    damage(folder_of(tmp_path, 4))

    def refuse(path, target):
        raise DataError("no")

    monkeypatch.setattr(storage, "move", refuse)
    path, (notice,) = Checkpoints(tmp_path, None).choose("latest")
    assert path == tmp_path / "checkpoint-2"
    assert notice.startswith("checkpoint-4 is damaged (")
    assert notice.endswith("), and cannot be renamed")


def test_the_only_one_that_is_damaged_is_not_counted(tmp_path):
    damage(folder_of(tmp_path, 4))
    with pytest.raises(ConfigError, match=r"is damaged: checkpoint-4: "):
        Checkpoints(tmp_path, None).choose("latest")


@pytest.mark.parametrize("wanted", ["latest", "checkpoint-2"])
def test_a_large_file_is_read_before_a_run_goes_on_from_it(tmp_path, wanted):
    """A quick check of a folder leaves files above a mebibyte unread."""
    for step in (1, 2):
        with storage.commit_dir(tmp_path / f"checkpoint-{step}", {"global_step": step}) as folder:
            storage.write_bytes(folder / "weights", bytes(2**20 + 1))
    with (tmp_path / "checkpoint-2" / "weights").open("r+b") as file:
        file.write(b"x")
    checkpoints = Checkpoints(tmp_path, None)
    if wanted == "latest":
        path, [line] = checkpoints.choose(wanted)
        assert path == tmp_path / "checkpoint-1"
        assert line.startswith("checkpoint-2 is damaged")
    else:
        with pytest.raises(ConfigError, match="checkpoint-2 is damaged"):
            checkpoints.choose(wanted)


@pytest.mark.parametrize(("number", "is_damaged"), [(errno.ENOENT, True), (errno.ENOTDIR, True), (errno.EIO, False)])
def test_a_file_that_is_gone_when_it_is_opened_is_damage_and_a_faulty_disk_is_none(
    tmp_path, monkeypatch, number, is_damaged
):
    path = folder_of(tmp_path, 4)
    refuse_reading(monkeypatch, path / "weights", number)
    assert why_unreadable(path) == (None if is_damaged else f"weights: {os.strerror(number)}")
