"""Small folders as FireRed-Image-Edit's programs read them: a table of edits, and a meta folder with tasks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file

COLORS = ("red", "green", "blue", "white", "black", "orange", "purple", "gray")


def write_images(folder: Path, count: int = 4) -> list[Path]:
    """Images of different sizes, so that they have buckets of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        path = folder / f"{number}.png"
        Image.new("RGB", (64 + 32 * (number % 2), 64), COLORS[number % len(COLORS)]).save(path)
        paths.append(path)
    return paths


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_task(folder: Path, images: Sequence[Path], num_sources: Sequence[int], features: int, **cells: Any) -> Path:
    """A task whose rows have so many source images, with embeddings of random numbers."""
    rows = []
    for line, count in enumerate(num_sources):
        names = ("en", "cn", "droptext") if count else ("en", "cn")
        files = {name: folder / "embeddings" / f"{line}_{name}.safetensors" for name in names}
        for number, file in enumerate(files.values()):
            file.parent.mkdir(parents=True, exist_ok=True)
            generator = torch.Generator().manual_seed(100 * line + number)
            save_file({"prompt_embeds": torch.randn(5 + number, features, generator=generator)}, file)
        sources = [str(images[(line + place + 1) % len(images)]) for place in range(count)]
        rows.append(
            {
                "source_image": sources[0] if count == 1 else sources or None,
                "edit_image": str(images[line % len(images)]),
                "instruction": f"edit {line}",
                "instruction_cn": f"编辑 {line}",
                **{f"embeddings_tensor_{name}": file.as_posix() for name, file in files.items()},
                **cells,
            }
        )
    write_table(folder / "rows_rank_000.jsonl", rows)
    return folder
