"""The page of `simpletuner check`: one HTML file with everything in it, to be opened in any browser or sent by mail."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from simpletuner import storage
from simpletuner.commands.check import Check, DatasetCheck, sorted_sizes
from simpletuner.data.tiles import Tile
from simpletuner.text import printable

LARGEST_SIDE = 384

_STYLE = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #6b7785; --paper: #fff; --card: #f5f7f9; --line: #dfe4ea;
  --bar: #3b82f6; --lost: #cbd5e1; --warn: #b45309; --warn-paper: #fff7ed; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --muted: #94a3b0; --paper: #14181d; --card: #1d232a;
  --line: #313a44; --bar: #60a5fa; --lost: #3a4550; --warn: #fbbf24; --warn-paper: #2b2314; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1280px; padding: 32px 24px 64px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 44px 0 12px; padding-top: 20px;
  border-top: 1px solid var(--line); }
p { margin: 4px 0; } .muted { color: var(--muted); }
.warn { background: var(--warn-paper); border-left: 3px solid var(--warn); padding: 8px 12px; margin: 8px 0;
  border-radius: 0 6px 6px 0; overflow-wrap: anywhere; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 16px; margin: 12px 0; }
.card { background: var(--card); border-radius: 10px; padding: 14px 16px; overflow-wrap: anywhere; }
.card h3 { font-size: 12px; letter-spacing: .06em; text-transform: uppercase; color: var(--muted); margin: 0 0 8px; }
.stage { display: grid; grid-template-columns: 104px 1fr 64px; gap: 10px; align-items: center; }
.stage b { text-align: right; font-variant-numeric: tabular-nums; font-weight: 600; }
.track { background: var(--lost); border-radius: 4px; height: 10px; overflow: hidden; }
.track i { display: block; height: 100%; background: var(--bar); }
table { border-collapse: collapse; width: 100%; } td { padding: 2px 0; } td + td { text-align: right;
  font-variant-numeric: tabular-nums; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 18px; margin-top: 18px; }
figure { margin: 0; } .images { display: flex; gap: 3px; aspect-ratio: 1; background: var(--card);
  border-radius: 8px; overflow: hidden; align-items: center; justify-content: center; }
.images img { max-width: 100%; max-height: 100%; min-width: 0; flex: 0 1 auto; object-fit: contain; }
.small img { image-rendering: pixelated; width: 100%; height: 100%; }
figcaption { margin-top: 6px; font-size: 13px; line-height: 1.4; overflow-wrap: anywhere; }
figcaption small { display: block; color: var(--muted); } figcaption .enlarged { color: var(--warn); }
"""


def write_page(path: Path, found: Check, tiles: Sequence[Sequence[Tile]]) -> None:
    """Write the page; `tiles` are the images of each dataset."""
    parts = [f"<h1>{escape(found.name)}</h1>", f'<p class="muted">{escape(found.steps_line)}</p>']
    parts += [f'<p class="warn">{escape(line)}</p>' for line in found.warnings]
    parts += [_dataset(each, shown) for each, shown in zip(found.datasets, tiles, strict=True)]
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(found.name)}: data check</title><style>{_STYLE}</style></head><body>\n"
    )
    storage.write_bytes(path, (head + "\n".join(parts) + "\n</body></html>\n").encode("utf-8", "backslashreplace"))


def _dataset(each: DatasetCheck, tiles: Sequence[Tile]) -> str:
    warnings = (*each.dataset.filter_report.warnings, *each.remedies)
    remedies = "".join(f'<p class="warn">{escape(line)}</p>' for line in warnings)
    cards = "".join(
        f'<div class="card"><h3>{title}</h3>{body}</div>'
        for title, body in (
            ("FilterReport", _filter_report(each)),
            ("Sizes, width x height", _sizes(each)),
            ("Captions and latents", _captions(each)),
        )
    )
    figures = "".join(map(_figure, tiles))
    return f'<h2>{escape(each.title)}</h2>{remedies}<div class="facts">{cards}</div><div class="tiles">{figures}</div>'


def _filter_report(each: DatasetCheck) -> str:
    most = max(each.dataset.filter_report.found, 1)
    rows = [
        f'<div class="stage"><span>{name}</span><span class="track"><i style="width:{100 * count / most:.1f}%"></i>'
        f"</span><b>{count:,}</b></div>"
        for name, count in each.stages
    ]
    filter_report = each.dataset.filter_report
    lines = [f"{filter_report.per_epoch:,} in each epoch (repeats {each.dataset.repeats})", *filter_report.note_lines()]
    return "".join([*rows, *(f'<p class="muted">{escape(line)}</p>' for line in lines)])


def _sizes(each: DatasetCheck, most: int = 12) -> str:
    sizes = sorted_sizes(each)
    rows = "".join(f"<tr><td>{width} x {height}</td><td>{count:,}</td></tr>" for (height, width), count in sizes[:most])
    others = sum(count for _, count in sizes[most:])
    if others:
        rows += f"<tr><td>{len(sizes) - most} other sizes</td><td>{others:,}</td></tr>"
    return f"<table>{rows}</table>"


def _captions(each: DatasetCheck) -> str:
    lines = [*each.captions.lines(), f"latents: {each.cache.line()}"]
    if each.captions.longest:
        lines.append(f"longest caption: {printable(each.captions.longest)[:300]}")
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def _figure(tile: Tile) -> str:
    small = " small" if max(tile.image.size) < LARGEST_SIDE // 2 else ""
    images = "".join(map(_img, tile.images))
    enlarged = ' class="enlarged"' if tile.is_enlarged else ""
    return (
        f'<figure><div class="images{small}">{images}</div><figcaption>{escape(printable(tile.caption))}'
        f"<small{enlarged}>{escape(tile.note)}</small><small>{escape(printable(tile.path))}</small>"
        "</figcaption></figure>"
    )


def _img(image: Image.Image) -> str:
    """The image inside the page: small ones exact, large ones reduced and as JPEG."""
    buffer = io.BytesIO()
    if max(image.size) <= LARGEST_SIDE // 2:
        image.save(buffer, format="PNG")
        kind = "png"
    else:
        reduced = image.convert("RGB")
        reduced.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        reduced.save(buffer, format="JPEG", quality=88)
        kind = "jpeg"
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="" src="data:image/{kind};base64,{data}">'
