"""What is damaged, or cannot be read now, is reported each time and never a fresh start."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from simpletuner import storage
from simpletuner.errors import ConfigError, DataError
from simpletuner.training.checkpoint import Checkpoints


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
    import os

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
        with pytest.raises(ConfigError, match=r"every checkpoint.*is damaged \(3 of them\)") as caught:
            Checkpoints(tmp_path, None).choose("latest")
        assert "resume_from_checkpoint=none" in str(caught.value)
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_damaged_one_is_renamed_a_second_time_too_where_an_older_one_is_whole(tmp_path):
    folder_of(tmp_path, 2)
    for name in ("damaged-checkpoint-4", "damaged-checkpoint-4-2"):
        damage(folder_of(tmp_path, 4))
        path, (notice,) = Checkpoints(tmp_path, None).choose("latest")
        assert path == tmp_path / "checkpoint-2"
        assert name in notice
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
            with pytest.raises(DataError, match=r"(?s)checkpoint-4.*cannot be read now.*=checkpoint-2") as caught:
                Checkpoints(tmp_path, None).choose("latest")
        assert caught.value.exit_code == 3
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
    assert Checkpoints(tmp_path, None).choose("latest") == (newest, [])


def test_one_that_a_newer_version_wrote_is_left_alone(tmp_path):
    make_newer(folder_of(tmp_path, 4))
    for _ in range(2):
        with pytest.raises(DataError, match="a newer version of simpletuner wrote it"):
            Checkpoints(tmp_path, None).choose("latest")
        assert names(tmp_path) == ["checkpoint-4"]
    folder_of(tmp_path, 2)
    assert Checkpoints(tmp_path, None).choose("checkpoint-2")[0] == tmp_path / "checkpoint-2"


def test_a_file_that_is_missing_is_damage(tmp_path):
    folder_of(tmp_path, 2)
    (folder_of(tmp_path, 4) / "weights").unlink()
    assert Checkpoints(tmp_path, None).choose("latest")[0] == tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-2", "damaged-checkpoint-4"]
