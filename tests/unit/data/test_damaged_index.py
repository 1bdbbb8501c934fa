"""A folder that cannot be listed is never an empty one; a damaged index is made again; a read-only one serves."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.data import index as index_module
from simpletuner.data.backends import local
from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.index import Index
from simpletuner.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png", "sub/c.png", "sub/deep/d.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (len(name), 0, 0)).save(path)
    return tmp_path / "images"


def paths_of(index: Index) -> list[str]:
    return [row.path for row in index.images([int(key) for key in index.scan().ids])]


ALL = ["a.png", "b.png", "sub/c.png", "sub/deep/d.png"]


def refuse_listing(monkeypatch, name: str, times: int, number: int = errno.EIO) -> None:
    """`os.scandir` of folders of this name fails so many times."""
    scandir, failed = os.scandir, []

    def refusing(path):
        if os.path.basename(os.fspath(path).rstrip("/")) == name and len(failed) < times:  # noqa: PTH119 - as the backend has it
            failed.append(path)
            raise OSError(number, os.strerror(number), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    monkeypatch.setattr(local, "_PAUSE_SECONDS", 0.0)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_listing_that_fails_is_tried_again(folder, tmp_path, monkeypatch, number):
    refuse_listing(monkeypatch, "sub", 2, number)
    assert paths_of(Index(tmp_path / "i.sqlite", LocalBackend(folder))) == ALL


@pytest.mark.parametrize("name", ["sub", "deep", "images"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_folder_that_cannot_be_listed_is_an_error_where_it_held_images(folder, tmp_path, monkeypatch, name, number):
    index = Index(tmp_path / "i.sqlite", LocalBackend(folder))
    assert paths_of(index) == ALL
    with monkeypatch.context() as patched:
        refuse_listing(patched, name, 99, number)
        held = {"sub": 2, "deep": 1, "images": 4}[name]
        with pytest.raises(DataError, match=f"cannot be listed.*it held {held} images"):
            index.scan()
    assert paths_of(index) == ALL


def test_one_that_never_held_any_is_reported_and_left_out(folder, tmp_path, monkeypatch):
    refuse_listing(monkeypatch, "deep", 99, errno.EACCES)
    index = Index(tmp_path / "i.sqlite", LocalBackend(folder))
    assert paths_of(index) == ALL[:3]
    assert list(index.skipped().counts) == ["folder: Permission denied"]


def test_bits_that_flip_in_the_index_are_repaired_or_reported(folder, tmp_path):
    path = tmp_path / "i.sqlite"
    index = Index(path, LocalBackend(folder))
    index.scan()
    index.close()
    whole = path.read_bytes()
    rng, outcomes = random.Random(5), {"whole": 0, "told": 0}
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 30)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(data))
        try:
            damaged = Index(path, LocalBackend(folder))
            paths_of(damaged)
            damaged.texts([int(key) for key in damaged.scan().texts])
            damaged.close()
            outcomes["whole"] += 1
        except DataError:
            outcomes["told"] += 1
    assert outcomes["whole"] > 140


def test_an_index_that_is_no_database_any_more_is_made_again(folder, tmp_path):
    path = tmp_path / "i.sqlite"
    for content in (b"", b"no database", bytes(8192)):
        path.write_bytes(content)
        index = Index(path, LocalBackend(folder))
        assert paths_of(index) == ALL
        index.close()


def test_a_cache_that_can_only_be_read_serves_and_no_file_is_read_again(folder, tmp_path, monkeypatch):
    path = tmp_path / "cache" / "i.sqlite"
    written = Index(path, LocalBackend(folder))
    written.scan()
    written.close()
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    monkeypatch.setattr(index_module, "is_writable", lambda path: False)
    backend = LocalBackend(folder)
    monkeypatch.setattr(backend, "read", lambda path: pytest.fail("it was read before"))
    assert paths_of(Index(path, backend)) == ALL
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    assert paths_of(Index(tmp_path / "none" / "i.sqlite", LocalBackend(folder))) == ALL
    assert not (tmp_path / "none").exists()
