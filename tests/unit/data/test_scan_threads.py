"""Small files of a quick disk are looked at one after the other: Python does one thing at a time, and threads cost."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from simpletuner.data import scan
from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.index import Index

NUM_FILES = 40  # in three tasks
HERE = threading.current_thread


class Clock:
    """The scan's, which time passes on only while a file is read."""

    def __init__(self, seconds: float, cpu_seconds: float):
        self.seconds, self.cpu_seconds, self.num_read = seconds, cpu_seconds, 0

    def as_module(self) -> SimpleNamespace:
        return SimpleNamespace(
            monotonic=time.monotonic,
            perf_counter=lambda: self.seconds * self.num_read,
            thread_time=lambda: self.cpu_seconds * self.num_read,
        )


def readers(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    clock: Clock | None = None,
    decodes: bool = True,
    num_readers: int | None = None,
) -> list[bool]:
    """Of each file that was looked at, in the order of their names, whether the thread of the scan did so."""
    clock = clock or Clock(1.0, 0.9)
    monkeypatch.setattr(scan, "time", clock.as_module())
    scanning, is_here = HERE(), {}
    backend = LocalBackend(folder)
    monkeypatch.setattr(backend, "num_readers", num_readers)
    read = backend.read

    def noted(path: bytes) -> bytes:
        is_here[path] = HERE() is scanning
        clock.num_read += 1
        return read(path)

    monkeypatch.setattr(backend, "read", noted)
    Index(folder.parent / "index.sqlite", backend).scan(decodes=decodes)
    return [is_here[path] for path in sorted(is_here)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.mark.parametrize(
    ("seconds", "cpu_seconds", "num_here"),
    [(1.0, 1.0, NUM_FILES), (1.0, 0.5, NUM_FILES), (1.0, 0.49, 16), (1.0, 0.0, 16)],
)
def test_captions_are_read_by_threads_only_where_a_task_waits_for_more_than_half_of_its_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, cpu_seconds: float, num_here: int
) -> None:
    for index in range(NUM_FILES):
        (folder / f"{index:02}.txt").write_text("a caption")
    found = readers(folder, monkeypatch, Clock(seconds, cpu_seconds))
    assert found == [True] * num_here + [False] * (NUM_FILES - num_here)


@pytest.mark.parametrize(
    ("suffix", "decodes", "side", "is_here"),
    [
        ("png", False, 8, True),
        ("png", True, 8, False),
        ("webp", False, 8, False),  # whatever is not a PNG is decoded
        ("bmp", False, 8, False),
    ],
)
def test_images_that_are_decoded_are_read_by_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, decodes: bool, side: int, is_here: bool
) -> None:
    for index in range(NUM_FILES):
        Image.new("RGB", (side, side), (index, 0, 0)).save(folder / f"{index:02}.{suffix}")
    assert readers(folder, monkeypatch, decodes=decodes) == [is_here] * NUM_FILES


@pytest.mark.parametrize(("size", "is_here"), [(65_536, True), (65_537, False)])
def test_files_of_more_than_64_kib_on_average_are_read_by_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch, size: int, is_here: bool
) -> None:
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    small = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(small + b"\0" * (2 * size - len(small) - 9))
    (folder / "b.txt").write_bytes(b"a caption")
    assert readers(folder, monkeypatch, decodes=False) == [is_here] * 2


def test_a_backend_that_names_its_readers_gets_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "a.txt").write_text("a caption")
    assert readers(folder, monkeypatch, num_readers=4) == [False]


def test_a_first_scan_of_a_folder_waits_for_the_disk_four_times(folder: Path, tmp_path: Path) -> None:
    """For the facts, the folder's files, what they are, and the catalog; a scan that finds nothing new never."""
    for index in range(NUM_FILES):
        (folder / f"{index:02}.txt").write_text("a caption")
    statements: list[str] = []
    index = Index(tmp_path / "index.sqlite", LocalBackend(folder))
    index._db.set_trace_callback(statements.append)
    index.scan()
    assert statements.count("COMMIT") == 4
    writes = ("INSERT", "UPDATE", "DELETE", "CREATE", "PRAGMA")
    begun = [sum(each.startswith("BEGIN") for each in statements[:at]) for at, _ in enumerate(statements)]
    ended = [statements[:at].count("COMMIT") for at, _ in enumerate(statements)]
    outside = [each for at, each in enumerate(statements) if each.startswith(writes) and begun[at] == ended[at]]
    there = ("CREATE TEMP TABLE", "CREATE TABLE IF NOT EXISTS undecoded")  # nothing on the disk; an earlier version's
    assert [each for each in outside if not each.startswith(there)] == []
    statements.clear()
    index.scan()
    assert "COMMIT" not in statements
