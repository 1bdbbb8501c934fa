"""Entries of a store for its tests, and where its shards lie."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch


def entry(number: int) -> dict[str, torch.Tensor]:
    return {"mean": torch.full((2, 3), float(number)), "std": torch.full((2, 3), number + 0.5)}


def entries(count: int, start: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    return {f"key{i}": entry(i) for i in range(start, start + count)}


def shard_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.safetensors"))


def flip_in_entry(shard: Path, key: str) -> None:
    """Flip one bit of the first byte of an entry's `mean`, at the place that the file's own header gives."""
    data = bytearray(shard.read_bytes())
    length = int.from_bytes(data[:8], "little")
    start = json.loads(data[8 : 8 + length])[f"{key}/mean"]["data_offsets"][0]
    data[8 + length + start] ^= 1
    stat = shard.stat()
    shard.write_bytes(data)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
