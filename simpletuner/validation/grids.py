"""Sheets that put pictures side by side: base | step | EMA for each prompt, and contact sheets with a line under each.

Small pictures are enlarged by whole factors without smoothing, so that what is seen is what was drawn.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from simpletuner.fonts import font_for

INK, MUTED, PAPER, EMPTY = "#1f2933", "#6b7785", "#ffffff", "#f1f3f5"
SMALLEST_CELL, LARGEST_CELL = 192, 512
GAP, MARGIN = 12, 20
TITLE_SIZE, HEADING_SIZE, LABEL_SIZE = 22, 17, 15


@dataclass(frozen=True)
class Row:
    """One line of a comparison: the same prompt, drawn by different weights.

    Args:
        label: printed above the pictures, cut with an ellipsis where it is too long.
        images: one per column; None leaves the place empty.
    """

    label: str
    images: Sequence[Image.Image | None]


@dataclass(frozen=True)
class Tile:
    """One picture of a contact sheet, with a line under it in `colour`."""

    image: Image.Image
    label: str
    colour: str = INK


def comparison_sheet(
    columns: Sequence[str], rows: Sequence[Row], title: str = "", cell: int | None = None
) -> Image.Image:
    """Rows of prompts, columns of weights (`base`, `step 500`, `EMA`), headings on top.

    Args:
        cell: pixels; longest side of each picture. None shows pictures as large as they are, within reason.
    """
    assert columns, "a sheet has at least one column"
    assert all(len(row.images) == len(columns) for row in rows), "every row has a picture or None per column"
    fit = fit_cell if cell is None else functools.partial(scaled_to_side, side=cell)
    shown = [[None if image is None else fit(image) for image in row.images] for row in rows]
    sizes = [image.size for row in shown for image in row if image is not None]
    cell_width = max([cell or SMALLEST_CELL, *(width for width, _ in sizes)])
    row_heights = [max([0, *(image.height for image in row if image is not None)]) for row in shown]

    label_height, heading_height = LABEL_SIZE + 12, HEADING_SIZE + 14
    top = MARGIN + (TITLE_SIZE + 18 if title else 0)
    width = 2 * MARGIN + len(columns) * cell_width + (len(columns) - 1) * GAP
    height = top + heading_height + sum(row_heights) + len(rows) * (label_height + GAP) + MARGIN
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        write(draw, (MARGIN, MARGIN), title, INK, TITLE_SIZE, width - 2 * MARGIN)
    lefts = [MARGIN + index * (cell_width + GAP) for index in range(len(columns))]
    for left, heading in zip(lefts, columns, strict=True):
        write(draw, (left, top), heading, INK, HEADING_SIZE, cell_width)

    y = top + heading_height
    for row, images, row_height in zip(rows, shown, row_heights, strict=True):
        write(draw, (MARGIN, y), row.label, MUTED, LABEL_SIZE, width - 2 * MARGIN)
        y += label_height
        for left, image in zip(lefts, images, strict=True):
            if image is None:
                draw.rectangle((left, y, left + cell_width - 1, y + row_height - 1), fill=EMPTY)
            else:
                sheet.paste(image, (left, y))
        y += row_height + GAP
    return sheet


def contact_sheet(tiles: Sequence[Tile], columns: int = 8, title: str = "", cell: int = 128) -> Image.Image:
    """All pictures in reading order, `columns` abreast, each with its label under it.

    Args:
        cell: pixels; side of the square that each picture is fitted into.
    """
    columns = max(1, min(columns, len(tiles)))
    num_rows = -(-len(tiles) // columns)
    label_height = LABEL_SIZE + 10
    top = MARGIN + (TITLE_SIZE + 18 if title else 0)
    width = 2 * MARGIN + columns * cell + (columns - 1) * GAP
    sheet = Image.new("RGB", (width, top + num_rows * (cell + label_height + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    if title:
        write(draw, (MARGIN, MARGIN), title, INK, TITLE_SIZE, width - 2 * MARGIN)
    for index, tile in enumerate(tiles):
        left = MARGIN + (index % columns) * (cell + GAP)
        y = top + (index // columns) * (cell + label_height + GAP)
        image = scaled_to_side(tile.image, cell)
        sheet.paste(image, (left + (cell - image.width) // 2, y + (cell - image.height) // 2))
        write(draw, (left, y + cell + 4), tile.label, tile.colour, LABEL_SIZE, cell)
    return sheet


def fit_cell(image: Image.Image) -> Image.Image:
    """The picture at a size that a sheet can show: small ones enlarged, very large ones reduced."""
    longest = max(image.size)
    if longest >= SMALLEST_CELL and longest <= LARGEST_CELL:
        return image.convert("RGB")
    return scaled_to_side(image, SMALLEST_CELL if longest < SMALLEST_CELL else LARGEST_CELL)


def scaled_to_side(image: Image.Image, side: int) -> Image.Image:
    """The longest side made at most `side` (reduced smoothly), or enlarged by the largest whole factor up to it.

    Where no whole factor comes near (above two thirds of `side`), the picture is enlarged to `side` exactly.
    """
    longest = max(image.size)
    factor = side // longest
    if factor >= 1 and factor * longest * 3 >= side * 2:
        size = (image.width * factor, image.height * factor)
        return image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    size = (max(1, round(image.width * side / longest)), max(1, round(image.height * side / longest)))
    filter_ = Image.Resampling.NEAREST if side > longest else Image.Resampling.LANCZOS
    return image.convert("RGB").resize(size, filter_)


def write(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, colour: str, size: int, width: float) -> None:
    """`text` on one line, cut where it is wider than `width` pixels."""
    draw.text(at, elided(text, size, width), colour, font_for(text, size))


def elided(text: str, size: int, width: float) -> str:
    """`text` on one line, cut with an ellipsis so that it is at most `width` pixels wide at this font size."""
    text = " ".join(text.split())
    font = font_for(text, size)
    if font.getlength(text) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle].rstrip() + "…") <= width:
            low = middle
        else:
            high = middle - 1
    return text[:low].rstrip() + "…"
