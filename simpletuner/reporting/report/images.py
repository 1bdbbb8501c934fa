"""Images inside the page, within a budget: a report can be sent by mail whatever the run has generated."""

from __future__ import annotations

import base64
import io
from html import escape
from pathlib import Path

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

    def img(self, path: Path, alt: str = "") -> str:
        """The image as an element of its own bytes; a note where it cannot be read or there is no room left."""
        from PIL import Image

        try:
            with Image.open(path) as image:
                data, is_small = self._encoded(image.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError):
            return '<span class="missing">not readable</span>'
        if len(data) > self._left:
            self.left_out += 1
            return '<span class="missing">no room</span>'
        self._left -= len(data)
        text = base64.b64encode(data).decode()
        small = ' class="small"' if is_small else ""
        return f'<img{small} alt="{escape(alt)}" decoding="async" src="data:image/webp;base64,{text}">'

    def _encoded(self, image) -> tuple[bytes, bool]:  # type: ignore[no-untyped-def]
        from PIL import Image

        buffer = io.BytesIO()
        is_small = max(image.size) <= EXACT_SIDE
        if is_small:
            image.save(buffer, format="WEBP", lossless=True)
        else:
            image.thumbnail((self.side, self.side), Image.Resampling.LANCZOS)
            image.save(buffer, format="WEBP", quality=82)
        return buffer.getvalue(), is_small
