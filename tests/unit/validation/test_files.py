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
from simpletuner.reporting.events import SavedImage
from simpletuner.validation import files
from simpletuner.validation.files import ImageFiles, spread
from simpletuner.validation.grids import SheetRow
from simpletuner.validation.prompts import GenerationSettings, ImageRequest, SkippedLayers
from simpletuner.validation.references import ReferenceImage
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
    reference = ReferenceImage("cat.png", "0" * 64, Image.new("RGB", (8, 8)))
    assert not ImageFiles(tmp_path, [replace(request, references=(reference,))], {"model": "m"}).has_benchmark()
    known = ImageFiles(tmp_path, [request], {"model": "m"})
    assert known.benchmark_path(request) == tmp_path / "benchmarks" / "base_model" / "a_8x8.png"
    note = tmp_path / "benchmarks" / "base_model" / "benchmark.json"
    kept = note.read_text()
    for damaged in ("{", "[" * 100_000):
        note.write_text(damaged)
        assert not known.has_benchmark()
    note.write_text(kept)
    assert known.has_benchmark()
    known.benchmark_path(request).unlink()
    assert not known.has_benchmark()


TWO = [
    ImageRequest("a/b", "a cat", 6, 8, 1, GenerationSettings(4, 2.0)),
    ImageRequest("a/b", "a cat", 6, 8, 2, GenerationSettings(4, 2.0), index=1),
]


def generated(shade: int = 0) -> list[GeneratedImage]:
    return [GeneratedImage(request, Image.new("RGB", (8, 6), (shade, 0, 0))) for request in TWO]


def test_every_image_is_saved_under_its_step_name_number_size_and_weights(tmp_path: Path):
    made = ImageFiles(tmp_path, TWO, {})
    images, base = tmp_path / "validation_images", tmp_path / "benchmarks" / "base_model"
    assert made.save(generated(), 5, "live") == [
        SavedImage(images / "step_5_a-b_0_8x6.png", "a/b", "a cat", 8, 6, 1, "live", 0),
        SavedImage(images / "step_5_a-b_1_8x6.png", "a/b", "a cat", 8, 6, 2, "live", 1),
    ]
    assert [each.path.name for each in made.save(generated(), 5, "ema")] == [
        "step_5_a-b_0_8x6_ema.png",
        "step_5_a-b_1_8x6_ema.png",
    ]
    assert made.save_benchmark(generated()) == [
        SavedImage(base / "a-b_8x6.png", "a/b", "a cat", 8, 6, 1, "base", 0),
        SavedImage(base / "a-b_1_8x6.png", "a/b", "a cat", 8, 6, 2, "base", 1),
    ]
    preview, size = Image.new("RGB", (4, 3)), (4, 3)
    for kind, suffix in (("base", "_base"), ("live", ""), ("ema", "_ema")):
        path = images / "previews" / f"step_5_a-b_1_8x6{suffix}_at_7.png"
        saved = made.save_preview(preview, TWO[1], 5, kind, 7)
        assert saved == SavedImage(path, "a/b", "a cat", *size, 2, kind, 1)
        assert path.is_file()


def test_a_step_is_complete_with_all_its_images_and_its_sheet(tmp_path: Path):
    made = ImageFiles(tmp_path, TWO, {})
    made.save(generated(), 5, "live")
    assert not made.has_step(5, ["live"])
    sheet = made.save_sheet(5)
    assert sheet == SavedImage(tmp_path / "validation_images/step_5_sheet.png", "sheet", "", 0, 0, None, "grid")
    assert made.has_step(5, ["live"])
    assert not made.has_step(6, ["live"])
    assert not made.has_step(5, ["live", "ema"])
    made.save(generated(), 5, "ema")
    assert made.has_step(5, ["live", "ema"])
    made.path(TWO[1], 5, "live").unlink()
    assert not made.has_step(5, ["live"])
    assert made.steps_with_images() == [5]  # the averaged weights' image stands for it
    made.path(TWO[1], 5, "ema").unlink()
    assert made.steps_with_images() == []


@pytest.fixture
def sheets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], list[SheetRow], str, int | None]]:
    made: list[tuple[list[str], list[SheetRow], str, int | None]] = []

    def comparison_sheet(columns: list[str], rows: list[SheetRow], title: str, cell: int | None) -> Image.Image:
        made.append((columns, rows, title, cell))
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(files, "comparison_sheet", comparison_sheet)
    return made


def test_sheets_show_the_base_the_steps_and_the_average_of_the_last_in_this_order(tmp_path: Path, sheets):
    made = ImageFiles(tmp_path, TWO, {})
    for step in (10, 20, 30, 40):
        made.save(generated(step), step, "live")
    made.save(generated(99), 40, "ema")
    assert made.write_before_after(25) is None
    assert made.write_all_steps(40) is None  # the other sheet shows all four
    assert made.write_before_after(40) == tmp_path / "before_after.png"
    made.save_benchmark(generated(1))
    made.save_sheet(20)
    made.save(generated(50), 50, "live")
    made.write_before_after(50)
    assert made.write_all_steps(50) == tmp_path / "all_steps.png"
    assert made.write_all_steps(40) is None
    assert [(columns, title, cell) for columns, _, title, cell in sheets] == [
        (["step 10", "step 20", "step 30", "step 40", "step 40, EMA"], "before and after", None),
        (["base model", "step 20"], "step 20", None),
        (["base model", "step 10", "step 20", "step 40", "step 50"], "before and after", None),
        (["base model", "step 10", "step 20", "step 30", "step 40", "step 50"], "all steps", 128),
    ]
    rows = sheets[0][1]
    assert [row.label for row in rows] == ["a/b (8x6): a cat", "a/b (8x6, no. 2): a cat"]
    shades = [[image.getpixel((0, 0))[0] for image in row.images if image] for row in rows]
    assert shades == [[10, 20, 30, 40, 99]] * 2


def test_the_sheet_of_all_steps_has_twenty_four_of_them(tmp_path: Path, sheets):
    made = ImageFiles(tmp_path, TWO[:1], {})
    for step in range(1, 31):
        made.save(generated()[:1], step, "live")
    made.write_all_steps(30)
    assert len(sheets[0][0]) == 24
    assert sheets[0][0][0] == "step 1"
    assert sheets[0][0][-1] == "step 30"
    made.path(TWO[0], 1, "live").unlink()
    assert made.write_all_steps(4) is None


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
