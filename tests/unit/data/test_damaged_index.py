"""A folder that cannot be listed is never an empty one; a damaged index is made again; a read-only one serves."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import random
import shutil
from pathlib import Path

import pytest
from PIL import Image

from simpletuner.data import index as index_module
from simpletuner.data.backends import local
from simpletuner.data.backends.base import UnusableFile
from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.index import Index
from simpletuner.data.scan import FileState, look_at
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
    (folder / "subway").mkdir()  # begins with the name of another folder, and is none of its
    shutil.copyfile(folder / "a.png", folder / "subway/e.png")
    index = Index(tmp_path / "i.sqlite", LocalBackend(folder))
    assert paths_of(index) == [*ALL, "subway/e.png"]
    with monkeypatch.context() as patched:
        refuse_listing(patched, name, 99, number)
        held = {"sub": 2, "deep": 1, "images": 5}[name]
        with pytest.raises(DataError, match=f"cannot be listed.*it held {held} images"):
            index.scan()
    assert paths_of(index) == [*ALL, "subway/e.png"]


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


class Given:
    """A backend whose files are what they are said to be."""

    location, num_readers = "here", None

    def __init__(self, content: bytes | Exception):
        self.content = content

    def read(self, path: bytes) -> bytes:
        if isinstance(self.content, Exception):
            raise self.content
        return self.content


def found(name: str, content: bytes | Exception, size: int = 5) -> tuple:
    finding = look_at(Given(content), FileState(os.fsencode(name), size, 1, 2, 3))
    return finding.status, finding.reason, finding.digest, finding.height, finding.width, finding.text


def digest_of(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def test_what_looking_at_a_file_gives() -> None:
    """Each way out, with its whole reason; the first ones without reading anything."""
    unread = AssertionError("it was read")
    assert found("a.png", unread, -1)[:2] == ("broken", "not a regular file, or a link to nothing")
    outside = "a link that leads out of the dataset's folder (follow_outside_links: true follows it)"
    assert found("a.png", unread, -2)[:2] == ("broken", outside)
    assert found("a.png", unread, -3)[:2] == ("broken", "larger than 512 MiB")
    photoshop = "Photoshop documents are not read: save them as PNG, JPEG or TIFF"
    assert found("a.PSD", unread)[:2] == ("broken", photoshop)
    assert found("a.cr2", unread)[1] == "camera raw images are not read: develop them to PNG, JPEG or TIFF"
    assert found("a.txt", unread, 1_000_001)[:2] == ("broken", "larger than 976.6 KiB")
    assert found("a.txt", b"x", 1_000_000)[0] == "ok"
    assert found("a.png", UnusableFile("never"))[:2] == ("broken", "never")
    assert found("a.png", OSError(5, "Input/output error"))[:2] == ("unreadable", "cannot be read: Input/output error")
    assert found("a.png", OSError("no number"))[:2] == ("unreadable", "cannot be read: no number")
    text = "a caption file that is not UTF-8, read as cp1252"
    assert found("a.TXT", b"caf\xe9") == ("ok", text, digest_of(b"caf\xe9"), None, None, "caf\xe9")
    assert found("a.caption", b" \n")[:2] == ("broken", "holds no text")
    assert found("a.txt", b"a\0")[:2] == (
        "broken",
        "holds a NUL character in line 1; UTF-16 and UTF-32 need their byte order mark",
    )
    assert found("a.png", b"")[:2] == ("broken", "the file is empty")
    frames = [Image.new("RGB", (6, 4), color) for color in ("red", "lime")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:], duration=100)
    data = buffer.getvalue()
    several = "several frames, of which the first is used"
    assert found("a.gif", data) == ("ok", several, digest_of(data), 4, 6, None)
    named = f"{several} and a name that is not UTF-8, read as cp1252"
    assert found(os.fsdecode(b"caf\xe9.gif"), data)[1] == named


def test_times_and_numbers_beyond_63_bits_are_kept_as_numbers_of_63_bits(tmp_path) -> None:
    (tmp_path / "a.png").write_bytes(b"12345")
    os.utime(tmp_path / "a.png", ns=(-7, -7))
    status = (tmp_path / "a.png").stat()
    expected = (5, 2**63 - 7, status.st_ctime_ns, status.st_ino)
    assert local.file_numbers(tmp_path / "a.png") == expected
    backend = local.LocalBackend(tmp_path)
    assert list(backend.files(b"")) == [(b"a.png", *expected)]
    assert [folder.error for folder in backend.folders()] == [None]
    assert local.file_numbers(tmp_path / "gone.png") == (-1, 0, 0, 0)
    assert local.file_numbers(tmp_path) == (-1, 0, 0, 0)
