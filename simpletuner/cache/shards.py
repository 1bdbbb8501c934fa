"""The file that cached tensors are kept in: a safetensors file with a sha256 of each entry in its metadata.

safetensors loads flipped bits without a word, hence the digests. They live in the file that they protect, so that a
shard is committed by one rename. Entries are read by position, not through a memory map: a file that is cut short
while it is mapped kills the process.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from simpletuner import storage
from simpletuner.errors import DataError, Problem, error_text
from simpletuner.text import read_json_text, read_tensor_header

if TYPE_CHECKING:
    import torch

FORMAT = "simpletuner-cache"
FORMAT_VERSION = 1

# safetensors' names of element types -> torch's.
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}


class DamagedShard(Exception):
    """A shard, or one entry of it, whose bytes are not what was written."""


class TensorPlace(NamedTuple):
    """Where one tensor lies in a shard; `start` and `end` in bytes from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Entry:
    """Where the tensors of one key lie, and their sha256."""

    digest: str
    tensors: tuple[TensorPlace, ...]

    def to_json(self) -> str:
        return json.dumps([self.digest, self.tensors], separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Entry:
        digest, rows = read_json_text(text)
        return cls(digest, tuple(TensorPlace(n, d, tuple(shape), start, end) for n, d, shape, start, end in rows))

    @property
    def num_bytes(self) -> int:
        return sum(place.end - place.start for place in self.tensors)


def write_shard(folder: Path, entries: Mapping[str, Mapping[str, torch.Tensor]]) -> Path:
    """Commit `key -> name -> tensor` as a new file in `folder`; its name is unique, so writers cannot meet.

    Not by `safetensors.torch`: its checks took more than half of the time of writing small tensors, and it refuses
    tensors that share memory, as the rows of a batch do.

    Raises:
        DataError: the disk is full, over quota or read-only; nothing is left behind.
    """
    import torch
    from safetensors import TensorSpec, serialize

    codes = {getattr(torch, torch_name): code for code, torch_name in _DTYPES.items()}
    digests: dict[str, str] = {}
    specs: dict[str, TensorSpec] = {}
    kept: list[torch.Tensor] = []  # what the addresses in `specs` are of
    for key, tensors in entries.items():
        digest = _start_digest(key)
        for name, tensor in sorted(tensors.items()):
            if tensor.dtype not in codes:
                raise TypeError(f"tensors of {tensor.dtype} cannot be cached ({name})")
            numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            code = codes[tensor.dtype]
            _add_to_digest(digest, name, code, tuple(tensor.shape), numbers.numpy().data)
            kept.append(numbers)
            specs[f"{key}/{name}"] = TensorSpec(
                dtype=_DTYPES[code], shape=list(tensor.shape), data_ptr=numbers.data_ptr(), data_len=numbers.nbytes
            )
        digests[key] = digest.hexdigest()
    metadata = {"format": FORMAT, "version": str(FORMAT_VERSION), "digests": json.dumps(digests, separators=(",", ":"))}
    path = folder / f"shard-{uuid.uuid4().hex}.safetensors"
    storage.write_bytes(path, serialize(specs, metadata))
    return path


def read_entries(path: Path) -> dict[str, Entry]:
    """The table of a shard, from its header alone: entries may lie beyond the end of a file that was cut short.

    Raises:
        DamagedShard: the header is not one of ours.
        DataError: a newer version of this program wrote the shard.
    """
    try:
        header, data_start = read_tensor_header(path)
    except ValueError as error:
        raise DamagedShard(f"{path} has a damaged header: {error}") from error
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise DamagedShard(f"{path} has no header of this cache")
    try:
        version, digests = int(metadata["version"]), read_json_text(metadata["digests"])
        if version > FORMAT_VERSION:
            raise DataError(
                Problem(
                    f"was written in cache format {version}",
                    file=str(path),
                    allowed=f"formats up to {FORMAT_VERSION}",
                    fix="use a newer version of simpletuner, or another cache folder",
                )
            )
        places: dict[str, list[TensorPlace]] = {key: [] for key in digests}
        for full_name, info in sorted(header.items()):
            key, _, name = full_name.partition("/")
            start, end = (data_start + int(offset) for offset in info["data_offsets"])
            if not data_start <= start <= end:
                raise DamagedShard(f"{path} has a damaged header")
            places[key].append(TensorPlace(name, info["dtype"], tuple(info["shape"]), start, end))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedShard(f"{path} has a damaged header: {error_text(error)}") from error
    return {key: Entry(digests[key], tuple(places[key])) for key in digests}


def load_entry(descriptor: int, key: str, entry: Entry) -> dict[str, torch.Tensor]:
    """Read the tensors of one key from an open shard and compare them with their digest.

    Raises:
        DamagedShard: they differ.
    """
    import torch

    size = os.fstat(descriptor).st_size
    digest = _start_digest(key)
    read = []
    for place in sorted(entry.tensors, key=lambda each: each.name):
        # Before memory is taken: a damaged header may ask for any amount.
        data = bytearray(place.end - place.start if place.end <= size else 0)
        if place.end > size or os.preadv(descriptor, [data], place.start) != len(data):
            raise DamagedShard("an entry is cut short")
        _add_to_digest(digest, place.name, place.dtype, place.shape, data)
        read.append((place, data))
    if digest.hexdigest() != entry.digest:
        raise DamagedShard("an entry does not match its sha256")
    tensors = {}
    try:
        for place, data in read:
            dtype = getattr(torch, _DTYPES[place.dtype])
            flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
            tensors[place.name] = flat.reshape(place.shape)
    except (KeyError, ValueError, RuntimeError) as error:  # a digest proves no more than who wrote it
        raise DamagedShard(f"an entry has an impossible type or shape: {error_text(error)}") from error
    return tensors


def _start_digest(key: str) -> hashlib._Hash:
    return hashlib.sha256(key.encode())


def _add_to_digest(
    digest: hashlib._Hash, name: str, dtype: str, shape: tuple[int, ...], data: bytearray | memoryview
) -> None:
    digest.update(_digest_text(name, dtype, shape))
    digest.update(data)


@functools.lru_cache
def _digest_text(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    return json.dumps([name, dtype, shape]).encode()
