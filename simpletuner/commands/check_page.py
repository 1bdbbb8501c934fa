"""The page of `simpletuner check`: one HTML file with everything in it, to be opened in any browser or sent by mail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.commands.check import Check, DatasetCheck, sorted_sizes
from simpletuner.data.tiles import Tile
from simpletuner.reporting.report.images import Embedder
from simpletuner.templating import render, to_bytes
from simpletuner.text import printable

MAX_CAPTION = 300


def write_page(path: Path, found: Check, tiles: Sequence[Sequence[Tile]]) -> None:
    """Write the page; `tiles` are the images of each dataset."""
    embed = Embedder(sum(len(tile.images) for shown in tiles for tile in shown))
    page = render(
        "check.html",
        name=found.name,
        steps_line=found.steps_line,
        warnings=found.warnings,
        datasets=[_dataset(each, shown, embed) for each, shown in zip(found.datasets, tiles, strict=True)],
    )
    storage.write_bytes(path, to_bytes(page))


def _dataset(each: DatasetCheck, tiles: Sequence[Tile], embed: Embedder) -> dict[str, Any]:
    filters = each.dataset.filter_report
    most = max(filters.found, 1)
    captions = [*each.captions.lines(), f"latents: {each.cache.line()}"]
    if each.captions.longest:
        captions.append(f"longest caption: {printable(each.captions.longest)[:MAX_CAPTION]}")
    return {
        "title": each.title,
        "warnings": [*filters.warnings, *each.remedies],
        "stages": [(name, count / most, f"{count:,}") for name, count in each.stages],
        "notes": [f"{filters.per_epoch:,} in each epoch (repeats {each.dataset.repeats})", *filters.note_lines()],
        "sizes": [(f"{width} x {height}", count) for (height, width), count in sorted_sizes(each)],
        "captions": captions,
        "tiles": [
            {
                "images": [embed.img_of(image.convert("RGB")) for image in tile.images],
                "caption": printable(tile.caption),
                "note": tile.note,
                "path": printable(tile.path),
                "is_enlarged": tile.is_enlarged,
            }
            for tile in tiles
        ],
    }
