"""Fonts for images with words in them. Pillow's own has no accents and no script but Latin, and prompts have.

Where it lacks a character of a text, the fonts of the machine are asked; the one that lacks the fewest is taken.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

# File names that Linux distributions, macOS and Windows bring along, those of many scripts last.
NAMES = (
    *("DejaVuSans.ttf", "LiberationSans-Regular.ttf", "NotoSans-Regular.ttf", "arial.ttf", "segoeui.ttf"),
    *("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc"),
    *("DroidSansFallbackFull.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "msyh.ttc", "Arial Unicode.ttf"),
)
# No font has a sign for this; what it draws instead is what stands for a character that it lacks.
_UNASSIGNED = "\U0010fffe"


def font_for(text: str, size: int) -> Font:
    """The font that a text is drawn with.

    Args:
        size: pixels.
    """
    from PIL import ImageFont

    own = ImageFont.load_default(size)
    if text.isascii() or not isinstance(own, ImageFont.FreeTypeFont):
        return own
    lacking = {font: _lacking(font, text) for font in (own, *_installed(size))}
    return min(lacking, key=lambda font: lacking[font])  # the first of equals


def _lacking(font: ImageFont.FreeTypeFont, text: str) -> int:
    """How many different characters of a text a font has no sign for."""
    nothing = bytes(font.getmask(_UNASSIGNED))
    return sum(bytes(font.getmask(character)) == nothing for character in set(text) if not character.isspace())


@functools.cache
def _installed(size: int) -> tuple[ImageFont.FreeTypeFont, ...]:
    return tuple(_find(size))


def _find(size: int) -> Iterator[ImageFont.FreeTypeFont]:
    from PIL import ImageFont

    for name in NAMES:
        try:
            yield ImageFont.truetype(name, size)  # looks through the folders of the system
        except OSError:
            continue
