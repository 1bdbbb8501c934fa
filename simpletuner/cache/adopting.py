"""Entries that another folder of the cache holds already: a dataset that is renamed finds what its old name encoded.

Keys tell the content, so whichever folder has a key has the right tensors. Files are linked, which takes no room, where
all of their entries are wanted; else the entries are copied.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from simpletuner.cache.store import QUARANTINE, DamagedEntry, StoreWriter, TensorStore


def folders_beside(root: Path, own: Path) -> list[Path]:
    """Every folder below `root` that holds cached tensors, but one."""
    found = {path.parent for path in root.rglob("shard-*.safetensors") if path.parent.name != QUARANTINE}
    return sorted(folder for folder in found if folder.resolve() != own.resolve())


@contextlib.contextmanager
def opened(folders: Iterable[Path]) -> Iterator[list[TensorStore]]:
    """The stores of some folders, closed again at the end."""
    with ExitStack() as stack:
        yield [stack.enter_context(TensorStore(folder)) for folder in folders]


def adopt(store: TensorStore, wanted: Collection[str], others: Iterable[TensorStore]) -> int:
    """Take over the entries that `store` lacks and another one has.

    Returns:
        How many were taken over.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    missing = set(store.missing(wanted))
    before = len(missing)
    for other in others:
        if not missing:
            break
        there = missing - set(other.missing(missing))
        if not there:
            continue
        for shard, keys in other.shards_of(there).items():
            if keys <= missing and _link(other.folder / shard, store.folder / shard):
                missing -= keys
        store.refresh()
        missing -= _copy(store, sorted(there & missing), other)
    return before - len(missing)


def _copy(store: TensorStore, keys: Iterable[str], other: TensorStore) -> set[str]:
    copied = set()
    with StoreWriter(store) as writer:
        for key in keys:
            with contextlib.suppress(KeyError, DamagedEntry):
                writer.put(key, other.get(key))
                copied.add(key)
    return copied


def _link(source: Path, target: Path) -> bool:
    """Whether both names are now one file; not every file system can do that."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, target)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True
