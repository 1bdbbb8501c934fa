"""Files of validation images: sheets, the known images of the base model, and disks that refuse."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from simpletuner import storage
from simpletuner.disk import DiskError
from simpletuner.validation import files
from simpletuner.validation.files import ImageFiles, spread
from simpletuner.validation.prompts import GenerationSettings, ImageRequest, SkippedLayers
from simpletuner.validation.sampling import GeneratedImage


def test_a_long_run_is_shown_by_evenly_spread_steps_and_its_last():
    assert spread(list(range(100, 1100, 100)), 4) == [100, 400, 700, 1000]
    assert spread([100, 200], 4) == [100, 200]
    assert spread([100, 200, 300], 1) == [300]


def test_images_of_the_base_are_known_again_until_their_settings_change(tmp_path: Path):
    request = ImageRequest("a", "a cat", 8, 8, 1, GenerationSettings(4, 2.0, skipped=SkippedLayers((7, 8))))
    ImageFiles(tmp_path, [request], {"model": "m"}).save_benchmark([GeneratedImage(request, Image.new("RGB", (8, 8)))])
    assert ImageFiles(tmp_path, [request], {"model": "m"}).has_benchmark()
    other = replace(request, settings=replace(request.settings, skipped=SkippedLayers((7, 9))))
    for changed in (other, replace(request, seed=2), replace(request, prompt="a dog")):
        assert not ImageFiles(tmp_path, [changed], {"model": "m"}).has_benchmark()
    assert not ImageFiles(tmp_path, [request], {"model": "n"}).has_benchmark()


def refuse(monkeypatch: pytest.MonkeyPatch, count: int) -> Callable[[], int]:
    """Let the disk refuse the next `count` renames; how often one was asked for."""
    asked = []

    def step(name: str) -> None:
        if name == "rename":
            asked.append(name)
            if len(asked) <= count:
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage, "_step", step)
    monkeypatch.setattr(files, "RETRY_SECONDS", 0.0)
    return lambda: len(asked)


def test_an_image_that_the_disk_refuses_once_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    request = ImageRequest("a", "a cat", 8, 8, 1, GenerationSettings(4, 2.0))
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    tries = refuse(monkeypatch, 1)
    [saved] = ImageFiles(tmp_path, [request], {}).save([GeneratedImage(request, image)], 5, "live")
    assert tries() == 2
    with Image.open(saved.path) as found:
        assert found.getpixel((0, 0)) == (10, 20, 30)


def test_an_image_that_the_disk_refuses_twice_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    request = ImageRequest("a", "a cat", 8, 8, 1, GenerationSettings(4, 2.0))
    tries = refuse(monkeypatch, 9)
    with pytest.raises(DiskError, match="the disk is full"):
        ImageFiles(tmp_path, [request], {}).save([GeneratedImage(request, Image.new("RGB", (8, 8)))], 5, "live")
    assert tries() == 2


def test_a_folder_that_cannot_be_made_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        files.write_png(tmp_path / "file" / "a.png", Image.new("RGB", (8, 8)))
