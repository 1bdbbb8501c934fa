"""A few images of a folder on a terminal: two pixels in each character, as the two halves of a block.

They are read as training reads them, so that an image that lies on its side here would be trained on its side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from rich.color import Color
from rich.style import Style
from rich.text import Text

from simpletuner.data.backends.base import Backend
from simpletuner.data.index import Catalog, Index

# Characters; five thumbnails and the gaps between them fit beside each other into 80 columns.
COLUMNS, ROWS = 14, 6
COUNT = 5
_UPPER_HALF = "▀"

Pixel = tuple[int, int, int]


@dataclass(frozen=True)
class Thumbnail:
    """One small image.

    Args:
        pixels: rows of pixels, an even number of rows, at most `2 * ROWS` by `COLUMNS`.
        size: (height, width) of the image itself.
    """

    pixels: tuple[tuple[Pixel, ...], ...]
    size: tuple[int, int]


def make_thumbnails(index: Index, backend: Backend, catalog: Catalog) -> list[Thumbnail]:
    """A few images, spread over the folder. A file that has just gone or changed is left out."""
    from PIL import Image

    from simpletuner.data.transforms import UnusableImage, load_image

    count = min(COUNT, len(catalog))
    ids = [int(catalog.ids[number * len(catalog) // count]) for number in range(count)]
    found = []
    for row in index.images(ids):
        try:
            image = load_image(backend.read(os.fsencode(row.path)))
        except (OSError, UnusableImage):
            continue
        scale = min(COLUMNS / image.width, 2 * ROWS / image.height)
        width, height = max(1, round(image.width * scale)), max(2, round(image.height * scale / 2) * 2)
        data = image.resize((width, height), Image.Resampling.BOX).tobytes()
        values = list(zip(data[0::3], data[1::3], data[2::3], strict=True))
        rows = tuple(tuple(values[line * width : (line + 1) * width]) for line in range(height))
        found.append(Thumbnail(rows, (row.height, row.width)))
    return found


def thumbnails_text(thumbnails: Sequence[Thumbnail]) -> Text:
    """The thumbnails beside each other, each with its size below."""
    lines = [Text(" ").join(_cells(each, row) for each in thumbnails) for row in range(ROWS)]
    sizes = (f"{width} x {height}" for height, width in (each.size for each in thumbnails))
    lines.append(Text(" ".join(size.center(COLUMNS) for size in sizes), "dim"))
    return Text("\n").join(lines)


def _cells(thumbnail: Thumbnail, row: int) -> Text:
    """One row of characters, the image in the middle of it."""
    num_rows, width = len(thumbnail.pixels) // 2, len(thumbnail.pixels[0])
    row -= (ROWS - num_rows) // 2
    if not 0 <= row < num_rows:
        return Text(" " * COLUMNS)
    left = (COLUMNS - width) // 2
    text = Text(" " * left)
    for upper, lower in zip(thumbnail.pixels[2 * row], thumbnail.pixels[2 * row + 1], strict=True):
        text.append(_UPPER_HALF, Style(color=Color.from_rgb(*upper), bgcolor=Color.from_rgb(*lower)))
    return text.append(" " * (COLUMNS - width - left))
