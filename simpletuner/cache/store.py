"""Tensors kept on disk under a key that is a digest of everything that made them.

Shards hold the tensors, `index.sqlite` tells which shard holds a key. The index only saves time: it is brought up to
date with the shards that are there when the store is opened, and made again where it is missing or damaged. Any number
of processes may read and write one folder: shards appear and vanish by one rename each.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner import storage, tempnames
from simpletuner.cache.index import ShardIndex
from simpletuner.cache.shards import DamagedShard, Entry, load_entry, read_entries, write_shard
from simpletuner.errors import DataError, Problem

if TYPE_CHECKING:
    import torch

Tensors = Mapping[str, "torch.Tensor"]

QUARANTINE = "quarantine"
_OPEN_SHARDS = 64


class DamagedEntry(DataError):
    """A cached entry whose bytes are not what was written. It is missing from now on: encode it again.

    Args:
        key: of the entry.
    """

    def __init__(self, key: str, folder: Path, reason: str):
        self.key = key
        super().__init__(
            Problem(
                f"a cached entry is damaged and was moved to quarantine: {reason}",
                file=str(folder),
                fix="start again: what is missing is encoded again; if it comes back, check the disk",
            )
        )


@dataclass(frozen=True)
class StoreStats:
    """How much a store holds; `num_bytes` is what its shards take on the disk."""

    num_entries: int
    num_shards: int
    num_bytes: int


class TensorStore:
    """A folder of tensors by key. Keys are hex digests, or any text without `/`.

    Threads may share a store; a forked child opens its own files. A folder that cannot be written can still be read.

    Args:
        folder: made on the first write.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._lock = threading.RLock()
        self._open_shards: OrderedDict[str, int] = OrderedDict()
        self._pid = os.getpid()
        self._lost: set[str] = set()
        tempnames.clean_stale(self.folder)
        self._index = ShardIndex(self.folder)
        self.refresh()

    def close(self) -> None:
        with self._lock:
            self._close_shards()
            self._index.close()

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ---- reading ---------------------------------------------------------------------------------------------------

    def get(self, key: str) -> dict[str, torch.Tensor]:
        """The tensors of a key, compared with their sha256.

        Raises:
            KeyError: there is none.
            DamagedEntry: there was one and its bytes have changed; it is missing from now on.
        """
        with self._own_files():
            found = self._index.find(key)
            if found is None:
                self.refresh()  # another process may have written it
                found = self._index.find(key)
            if found is None and not self._index.was_rebuilt:
                self._index.start_again()  # what was there when the run began may be hidden by a damaged index
                found = self._index.find(key)
            if found is None:
                raise KeyError(key)
            shard, entry = found
            try:
                return load_entry(self._descriptor(shard), key, entry)
            except FileNotFoundError:  # another process has rewritten or moved the shard
                self.refresh()
                if self._index.find(key) == found:
                    self._index.start_again()
                return self.get(key)
            except DamagedShard as damage:
                if self._index_was_wrong(shard, key, entry):
                    return self.get(key)
                self._quarantine(shard, key)
                raise DamagedEntry(key, self.folder, str(damage)) from damage

    def __contains__(self, key: str) -> bool:
        with self._own_files():
            return self._index.find(key) is not None

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are not there, in their order, each once."""
        wanted = list(dict.fromkeys(keys))
        with self._own_files():
            self.refresh()
            present = self._index.present(wanted)
        return [key for key in wanted if key not in present]

    def note_complete(self, name: str, num_entries: int) -> None:
        """Remember that all entries of something are there; `name` must tell everything that decides their keys."""
        with self._own_files():
            self._index.note_complete(name, num_entries)

    def forget_complete(self) -> None:
        """After an entry was missing that should have been there: nothing is known to be complete any more."""
        with self._own_files():
            self._index.forget_complete()

    def complete(self, name: str) -> int | None:
        """How many entries `note_complete` counted, while no shard has gone or changed since; else None."""
        with self._own_files():
            self.refresh()
            return self._index.complete(name)

    def keys(self) -> list[str]:
        with self._own_files():
            self.refresh()
            return self._index.keys()

    def shards_of(self, keys: Iterable[str]) -> dict[str, set[str]]:
        """The files that hold `keys`, and all that each of them holds."""
        wanted = set(keys)
        with self._own_files():
            held = {shard: set(self._index.keys_of(shard)) for shard in self._index.shards()}
        return {shard: of_shard for shard, of_shard in held.items() if of_shard & wanted}

    def stats(self) -> StoreStats:
        with self._own_files():
            self.refresh()
            return StoreStats(*self._index.totals())

    def refresh(self) -> None:
        """Take up what other processes have written or removed; `get` and `missing` do so themselves."""
        with self._own_files():
            for shard in self._index.refresh():
                self._quarantine(shard)

    # ---- writing ---------------------------------------------------------------------------------------------------

    def put_many(self, entries: Mapping[str, Tensors]) -> None:
        """Write entries and return when they are on the disk. Keys that are there already keep their values.

        Raises:
            DataError: the disk is full, over quota or read-only.
        """
        with self._own_files():
            absent = set(self.missing(entries))
            if absent:
                with storage.disk_errors(self.folder):
                    self.folder.mkdir(parents=True, exist_ok=True)
                path = write_shard(self.folder, {key: entries[key] for key in entries if key in absent})
                self._index.add(path.name)

    def verify(self) -> list[str]:
        """Read everything and compare; damaged entries are moved to quarantine.

        Returns:
            Keys that were lost to damage since the store was opened and have not been written again.
        """
        with self._own_files():
            self.refresh()
            for shard in self._index.shards():
                if self._damaged_keys(shard):
                    self._quarantine(shard)
            return sorted(self._lost - self._index.present(self._lost))

    def prune(self, keep_keys: Iterable[str]) -> int:
        """Remove all entries but `keep_keys`; shards that hold both kinds are rewritten.

        Returns:
            How many bytes became free on the disk.

        Raises:
            DataError: the folder cannot be written.
        """
        keep = set(keep_keys)
        with self._own_files():
            self.refresh()
            before = self._index.totals()[2]
            for shard in self._index.shards():
                entries = self._entries_of(shard)
                if entries.keys() <= keep:
                    continue
                self._rewrite(shard, {key: entry for key, entry in entries.items() if key in keep})
                self._drop(shard)
            return before - self._index.totals()[2]

    # ---- damage ----------------------------------------------------------------------------------------------------

    def _quarantine(self, shard: str, damaged_key: str | None = None) -> None:
        """Move a damaged shard to `quarantine/` and write its sound entries into a new one.

        Where the folder cannot be written, its entries (or `damaged_key` alone) only become missing in the index.
        """
        self._lost.update(self._index.keys_of(shard))
        if not self._index.is_writable:
            path = self.folder / shard
            entries = {} if damaged_key is None else self._entries_of(shard)
            entries.pop(damaged_key or "", None)
            self._index.note(shard, path.stat(), entries)
            return
        self._rewrite(shard, self._entries_of(shard))
        quarantine = self.folder / QUARANTINE
        # Where the file is gone, another process was quicker.
        with storage.disk_errors(quarantine), contextlib.suppress(FileNotFoundError):
            quarantine.mkdir(exist_ok=True)
            (self.folder / shard).rename(quarantine / shard)
        self._forget(shard)

    def _rewrite(self, shard: str, entries: Mapping[str, Entry]) -> None:
        """Write those of a shard's entries that are sound into a new shard."""
        sound = {}
        for key, entry in entries.items():
            with contextlib.suppress(DamagedShard, FileNotFoundError):
                sound[key] = load_entry(self._descriptor(shard), key, entry)
        if sound:
            path = write_shard(self.folder, sound)
            self._index.add(path.name)

    def _damaged_keys(self, shard: str) -> list[str]:
        damaged = []
        for key, entry in self._entries_of(shard).items():
            try:
                load_entry(self._descriptor(shard), key, entry)
            except DamagedShard:
                damaged.append(key)
            except FileNotFoundError:
                return []
        return damaged

    def _entries_of(self, shard: str) -> dict[str, Entry]:
        """The table in a shard's header; empty where the header is damaged or the shard is gone."""
        try:
            return read_entries(self.folder / shard)
        except (DamagedShard, FileNotFoundError):
            return {}

    def _index_was_wrong(self, shard: str, key: str, entry: Entry) -> bool:
        """Whether the shard's own header says something else than the index, which is then made again."""
        if self._index.was_rebuilt or self._entries_of(shard).get(key, entry) == entry:
            return False
        self._index.start_again()
        return True

    # ---- open files ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _own_files(self) -> Iterator[None]:
        """Hold the lock; after a fork, open files again: an SQLite connection must not be shared with the parent."""
        with self._lock:
            if self._pid != os.getpid():
                self._pid = os.getpid()
                self._inherited = self._index  # closing it here would free the parent's locks
                self._index = ShardIndex(self.folder)
            yield

    def _descriptor(self, shard: str) -> int:
        """An open file of a shard, the most recent ones kept open."""
        if shard in self._open_shards:
            self._open_shards.move_to_end(shard)
            return self._open_shards[shard]
        descriptor = os.open(self.folder / shard, os.O_RDONLY | os.O_CLOEXEC)
        self._open_shards[shard] = descriptor
        if len(self._open_shards) > _OPEN_SHARDS:
            os.close(self._open_shards.popitem(last=False)[1])
        return descriptor

    def _drop(self, shard: str) -> None:
        path = self.folder / shard
        with storage.disk_errors(path):
            path.unlink(missing_ok=True)
        self._forget(shard)

    def _forget(self, shard: str) -> None:
        if shard in self._open_shards:
            os.close(self._open_shards.pop(shard))
        self._index.forget(shard)

    def _close_shards(self) -> None:
        for descriptor in self._open_shards.values():
            os.close(descriptor)
        self._open_shards.clear()


class StoreWriter:
    """Gathers entries and commits them shard by shard. As a context manager it commits the rest at the end, also when
    the block ends by an error: what was encoded stays encoded. Safe to use from several threads.

    Args:
        executor: commits one shard in it while the entries of the next gather; None commits in `put`.
        max_entries: entries in a shard, at most.
        max_bytes: bytes after which a shard is committed.
        max_seconds: what a kill may cost: entries that wait this long are committed with the next one.
    """

    def __init__(
        self,
        store: TensorStore,
        max_entries: int = 1024,
        max_bytes: int = 64 << 20,
        max_seconds: float = 30.0,
        executor: Executor | None = None,
    ):
        self.store = store
        self._executor = executor
        self._committing: Future[None] | None = None
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.max_seconds = max_seconds
        self._lock = threading.Lock()
        self._waiting: dict[str, Tensors] = {}
        self._num_bytes = 0
        self._since = time.monotonic()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.flush()

    def put(self, key: str, tensors: Tensors) -> None:
        """Take an entry; commit a shard when enough have gathered.

        Raises:
            DataError: the disk is full, over quota or read-only; with an executor it is said at the next commit.
        """
        with self._lock:
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting[key] = tensors
            self._num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            is_full = len(self._waiting) >= self.max_entries or self._num_bytes >= self.max_bytes
            if is_full or time.monotonic() - self._since >= self.max_seconds:
                self._commit()

    def waiting(self, key: str) -> Tensors | None:
        """The tensors of a key that was put and is not on the disk yet."""
        with self._lock:
            return self._waiting.get(key)

    def flush(self) -> None:
        """Commit what waits, and return when it is on the disk."""
        with self._lock:
            self._commit()
            self._finish()

    def _commit(self) -> None:
        # Taken out first: after a full disk, the end of the block must not try the same again.
        entries, self._waiting, self._num_bytes = self._waiting, {}, 0
        self._finish()
        if self._executor is None:
            self.store.put_many(entries)
        else:
            self._committing = self._executor.submit(self.store.put_many, entries)

    def _finish(self) -> None:
        committing, self._committing = self._committing, None
        if committing is not None:
            committing.result()
