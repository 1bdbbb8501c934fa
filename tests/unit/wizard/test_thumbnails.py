"""Images on a terminal: right colors in the right halves, upright, inside the room they have."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.index import Index
from simpletuner.wizard.thumbnails import COLUMNS, COUNT, ROWS, Thumbnail, make_thumbnails, thumbnails_text

RED, BLUE = (255, 0, 0), (0, 0, 255)


def thumbnails_of(folder: Path) -> list[Thumbnail]:
    backend = LocalBackend(folder)
    index = Index(folder.parent / "index.sqlite", backend)
    try:
        return make_thumbnails(index, backend, index.scan())
    finally:
        index.close()


def two_halves(width: int, height: int) -> Image.Image:
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (0, height // 2, width, height))
    return image


def test_the_upper_half_of_a_block_is_the_upper_pixel(tmp_path: Path):
    (tmp_path / "images").mkdir()
    two_halves(120, 20).save(tmp_path / "images" / "wide.png")  # 14 x 2 characters' pixels: one row of blocks
    [thumbnail] = thumbnails_of(tmp_path / "images")
    assert thumbnail.pixels == ((RED,) * COLUMNS, (BLUE,) * COLUMNS)
    assert thumbnail.size == (20, 120)
    text = thumbnails_text([thumbnail])
    styles = {str(span.style) for span in text.spans if "on" in str(span.style)}
    assert styles == {"#ff0000 on #0000ff"}
    assert text.plain.count("▀") == COLUMNS


def test_an_image_that_the_camera_turned_stands_upright(tmp_path: Path):
    (tmp_path / "images").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    two_halves(40, 20).save(tmp_path / "images" / "turned.png", exif=exif)
    [thumbnail] = thumbnails_of(tmp_path / "images")
    assert thumbnail.size == (40, 20)
    assert len(thumbnail.pixels) == 2 * ROWS
    row = thumbnail.pixels[ROWS]
    assert (row[0], row[-1]) == (BLUE, RED)


def test_a_few_images_from_all_over_the_folder_fit_into_80_columns(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for number in range(10):
        Image.new("RGB", (30, 30 + number), RED).save(tmp_path / "images" / f"{number}.png")
    found = thumbnails_of(tmp_path / "images")
    assert [each.size[0] for each in found] == [30, 32, 34, 36, 38]
    lines = thumbnails_text(found).plain.splitlines()
    assert len(lines) == ROWS + 1
    assert max(map(len, lines)) == COUNT * (COLUMNS + 1) - 1 <= 74
    assert "30 x 38" in lines[-1]


def test_a_folder_without_images_has_no_thumbnails(tmp_path: Path):
    (tmp_path / "images").mkdir()
    assert thumbnails_of(tmp_path / "images") == []
