"""The contact sheet of `simpletuner check`: the very crops that the VAE gets, each with its caption under it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from simpletuner.data.tiles import Tile
from simpletuner.fonts import font_for
from simpletuner.storage import replacing_file
from simpletuner.validation.grids import EMPTY, INK, MUTED, PAPER, elided, scaled_to_side, write

CELL, GAP, MARGIN, COLUMNS = 192, 16, 28, 7
TITLE_SIZE, HEADING_SIZE, CAPTION_SIZE, NOTE_SIZE = 26, 19, 14, 12
CAPTION_LINES = 3
LINE = CAPTION_SIZE + 4
WARNING = "#b45309"


def render_sheet(title: str, sections: Sequence[tuple[str, Sequence[Tile]]]) -> Image.Image:
    """All tiles under the headings of their datasets."""
    widest = max([1, *(len(tiles) for _, tiles in sections)])
    num_columns = max(4, min(COLUMNS, widest))
    width = 2 * MARGIN + num_columns * CELL + (num_columns - 1) * GAP
    heights = [_section_height(tiles, num_columns) for _, tiles in sections]
    top = MARGIN + TITLE_SIZE + 20
    sheet = Image.new("RGB", (width, top + sum(heights) + MARGIN - GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    write(draw, (MARGIN, MARGIN), title, INK, TITLE_SIZE, width - 2 * MARGIN)
    for (heading, tiles), height in zip(sections, heights, strict=True):
        _render_section(sheet, draw, heading, tiles, top, num_columns)
        top += height
    return sheet


def write_sheet(path: Path, sheet: Image.Image) -> None:
    with replacing_file(path) as temporary:
        sheet.save(temporary, format="PNG")


def wrapped(text: str, size: int, width: float, num_lines: int) -> list[str]:
    """`text` in at most `num_lines` lines of `width` pixels; the last one ends in an ellipsis where text is left."""
    font, words = font_for(text, size), text.split()
    lines: list[str] = []
    while words and len(lines) < num_lines - 1:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= width:
            taken += 1
        lines.append(elided(" ".join(words[:taken]), size, width))
        words = words[taken:]
    if words:
        lines.append(elided(" ".join(words), size, width))
    return lines


def _tile_height(tiles: Sequence[Tile]) -> int:
    images = max((len(tile.images) for tile in tiles), default=1)
    return images * CELL + (images - 1) * 4 + 8 + CAPTION_LINES * LINE + NOTE_SIZE + 8


def _section_height(tiles: Sequence[Tile], num_columns: int) -> int:
    rows = -(-len(tiles) // num_columns)
    return HEADING_SIZE + 18 + rows * (_tile_height(tiles) + GAP)


def _render_section(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, heading: str, tiles: Sequence[Tile], top: int, num_columns: int
) -> None:
    write(draw, (MARGIN, top), heading, INK, HEADING_SIZE, sheet.width - 2 * MARGIN)
    top += HEADING_SIZE + 14
    for index, tile in enumerate(tiles):
        left = MARGIN + (index % num_columns) * (CELL + GAP)
        _render_tile(sheet, draw, tile, left, top + (index // num_columns) * (_tile_height(tiles) + GAP))


def _render_tile(sheet: Image.Image, draw: ImageDraw.ImageDraw, tile: Tile, left: int, top: int) -> None:
    for image in tile.images:
        draw.rectangle((left, top, left + CELL - 1, top + CELL - 1), fill=EMPTY)
        shown = scaled_to_side(image, CELL)
        sheet.paste(shown, (left + (CELL - shown.width) // 2, top + (CELL - shown.height) // 2))
        top += CELL + 4
    top += 4
    for line in wrapped(tile.caption, CAPTION_SIZE, CELL, CAPTION_LINES):
        draw.text((left, top), line, INK, font_for(tile.caption, CAPTION_SIZE))
        top += LINE
    color = WARNING if tile.is_enlarged else MUTED
    write(draw, (left, top + 2), tile.note, color, NOTE_SIZE, CELL)
