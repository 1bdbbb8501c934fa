"""Images as a service takes them: as they are where they fit, smaller where they do not."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp"}
_QUALITY = 88
_SMALLEST_SIDE = 32


@dataclass(frozen=True)
class Attachment:
    """An image to send."""

    name: str
    media_type: str
    data: bytes


def load_images(paths: Sequence[str], max_bytes: int) -> list[Attachment | None]:
    """The images, together at most `max_bytes`; None for one that is gone or broken."""
    sizes = [Path(path).stat().st_size if Path(path).is_file() else 0 for path in paths]
    if sum(sizes) <= max_bytes:
        return [load_image(path, max_bytes) for path in paths]
    return [load_image(path, max_bytes // len(paths)) for path in paths]


def load_image(path: str, max_bytes: int) -> Attachment | None:
    """An image of at most `max_bytes`: the file itself, or a JPEG, scaled down until it fits."""
    from PIL import Image

    file = Path(path)
    try:
        media_type = MEDIA_TYPES.get(file.suffix.lower())
        if media_type and file.stat().st_size <= max_bytes:
            return Attachment(file.name, media_type, file.read_bytes())
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError):
        return None
    while True:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=_QUALITY)
        size = buffer.tell()
        if size <= max_bytes or max(image.size) <= _SMALLEST_SIDE:
            return Attachment(f"{file.stem}.jpg", "image/jpeg", buffer.getvalue())
        # Bytes go with the area; a little less, so that it seldom takes a third round.
        factor = min(0.9 * (max_bytes / size) ** 0.5, 0.9)
        image = image.resize([max(int(side * factor), 1) for side in image.size])
