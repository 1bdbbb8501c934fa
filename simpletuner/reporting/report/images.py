"""Images inside a page, within a budget: a report can be sent by mail however many images the run generated."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

if TYPE_CHECKING:
    from PIL.Image import Image

BUDGET_BYTES = 9_000_000
LARGEST_SIDE, SMALLEST_SIDE = 640, 96
EXACT_SIDE = 160
# What WebP at the quality used here needs at most for an image with much detail.
BYTES_PER_PIXEL = 0.15


class Embedder:
    """Makes `<img>` elements; all of them together stay within the budget.

    Args:
        count: how many images there will be, which decides how large each may be.
    """

    def __init__(self, count: int, budget: int = BUDGET_BYTES):
        side = (budget / max(count, 1) / BYTES_PER_PIXEL) ** 0.5
        self.side = int(min(max(side, SMALLEST_SIDE), LARGEST_SIDE))
        self._left = budget
        self.left_out = 0

    def img(self, path: Path, alt: str = "") -> Markup:
        """The file as an element that holds its bytes; a note if it cannot be read or there is no room left."""
        from PIL import Image

        try:
            with Image.open(path) as image:
                return self.img_of(image.convert("RGB"), alt)
        except (OSError, ValueError, Image.DecompressionBombError):
            return Markup('<span class="missing">not readable</span>')

    def img_of(self, image: Image, alt: str = "") -> Markup:
        """As `img`, of an image in memory."""
        is_small = max(image.size) <= EXACT_SIDE
        data = _webp(image, None if is_small else self.side)
        if len(data) > self._left:
            self.left_out += 1
            return Markup('<span class="missing">no room</span>')
        self._left -= len(data)
        element = Markup('<img{} alt="{}" decoding="async" src="data:image/webp;base64,{}">')
        small = Markup(' class="small"') if is_small else ""
        return element.format(small, alt, base64.b64encode(data).decode())


def _webp(image: Image, side: int | None) -> bytes:
    """Reduced to `side`; None: exact."""
    from PIL import Image

    buffer = io.BytesIO()
    if side is None:
        image.save(buffer, format="WEBP", lossless=True)
    else:
        reduced = image.copy()
        reduced.thumbnail((side, side), Image.Resampling.LANCZOS)
        reduced.save(buffer, format="WEBP", quality=82)
    return buffer.getvalue()
