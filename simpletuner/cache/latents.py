"""Latents of images, encoded once: what the VAE says before scaling, under a key of everything that made it.

The key holds the content of the image, its crop, the way it becomes pixels and the VAE's fingerprint, so nothing that
changes can meet a stale entry, and what a change did not touch stays.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from simpletuner import storage
from simpletuner.batch import Sample
from simpletuner.cache.adopting import adopt
from simpletuner.cache.encoded import EncodedCache
from simpletuner.cache.encoding import (
    BatchEncoder,
    ImageSource,
    batches_of_one_size,
    encode_batch,
    in_tasks,
    num_readers,
    read_ahead,
)
from simpletuner.cache.store import DamagedEntry, StoreWriter, TensorStore
from simpletuner.data.transforms import TRANSFORM_VERSION
from simpletuner.errors import DataError, Problem
from simpletuner.models.family import LatentMoments

# Raise it when the same inputs would be stored in another way.
SCHEMA_VERSION = 1
_BATCHES_AHEAD = 2
# Samples that are made, sorted by size and encoded together: memory does not grow with the dataset.
_SAMPLES_AT_ONCE = 16384

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class UnusableSample:
    """A sample that has no latents, and why."""

    sample: Sample
    reason: str


@dataclass(frozen=True)
class Need:
    """Different latents of some samples: all, those that are not cached, and the bytes that these will take."""

    num_entries: int
    num_missing: int
    bytes_missing: int


@dataclass(frozen=True)
class FillReport:
    """What filling the cache did. An image that several samples cut in the same way counts once.

    Args:
        num_encoded: encoded now.
        num_cached: found in the cache.
        unusable: samples of the dataset that must not be trained on.
        seconds: wall clock.
    """

    num_encoded: int
    num_cached: int
    unusable: tuple[UnusableSample, ...] = ()
    seconds: float = 0.0


class LatentCache(EncodedCache):
    """The latents of one VAE in a store."""

    @property
    def settings(self) -> dict[str, Any]:
        return {"schema": SCHEMA_VERSION, "transform": TRANSFORM_VERSION, "vae": self.fingerprint}

    def key(self, sample: Sample) -> str:
        """sha256 in hex over everything that decides the latents of `sample`."""
        flipped = {"is_flipped": True} if sample.is_flipped else {}
        return self.digest({"picture": sample.digest, "crop": vars(sample.crop), **flipped})

    def get(self, sample: Sample) -> LatentMoments:
        """What the VAE said about `sample`, unscaled: `family.latents_from_moments` makes latents of it.

        Raises:
            DataError: it is not in the cache, or damaged (`DamagedEntry`).
        """
        try:
            return _to_moments(self.store.get(self.key(sample)))
        except KeyError:
            self.store.forget_complete()
            raise DataError(
                Problem(
                    f"the latents of {sample.path} (dataset {sample.dataset_id}) are no longer in the cache",
                    file=str(self.store.folder),
                    fix="start again: what is missing is encoded again",
                )
            ) from None

    def fill(
        self,
        dataset: ImageSource,
        load_vae: Callable[[], nn.Module],
        batch_size: int,
        report: Progress | None = None,
        num_processes: int = 1,
    ) -> FillReport:
        """Encode what is missing; reading, encoding and writing overlap.

        Args:
            load_vae: called only if something is missing.
            batch_size: images in every batch that the VAE sees.
            report: called as `report(done, total)` after each batch. What it raises, as a signal does, stops the work;
                what was encoded stays.
            num_processes: that fill caches on this machine, and share its cores.

        Raises:
            DataError: the disk has no room, or the device no memory for a batch.
        """
        started = time.monotonic()
        # Of few samples, these and their keys are made once.
        few = [*self._by_key(dataset.samples)] if len(dataset.samples) <= _SAMPLES_AT_ONCE else None
        need = self._need(few or self._by_key(dataset.samples))
        num_cached = need.num_entries - need.num_missing
        if not need.num_missing:
            return FillReport(0, num_cached, (), time.monotonic() - started)
        storage.require_free_space(self.store.folder, need.bytes_missing, "the latent cache")
        filling = _Filling(self, BatchEncoder(self.family, load_vae(), batch_size))
        num_done = num_cached

        def count_done(count: int) -> None:
            nonlocal num_done
            num_done += count
            if report:
                report(num_done, need.num_entries)

        for samples in few or self._by_key(dataset.samples):
            todo = {key: samples[key] for key in self.store.missing(samples) if key not in filling.reasons}
            if todo:
                filling.run(todo, dataset.read_pixels, num_readers(self.family.device, num_processes), count_done)
        num_encoded = need.num_missing - len(filling.reasons)
        return FillReport(num_encoded, num_cached, self._unusable(dataset, filling), time.monotonic() - started)

    def need(self, samples: Iterable[Sample], others: Sequence[TensorStore] = ()) -> Need:
        """What is there of some samples and what is not; nothing is encoded.

        Args:
            others: stores whose entries count as there too (`adopting.py`).
        """
        return self._need(self._by_key(samples), others)

    def _need(self, parts: Iterable[Mapping[str, Sample]], others: Sequence[TensorStore] = ()) -> Need:
        num_entries = num_missing = num_bytes = 0
        for part in parts:
            missing = self.store.missing(part)
            for other in others:
                missing = other.missing(missing)
            num_entries, num_missing = num_entries + len(part), num_missing + len(missing)
            num_bytes += sum(self.num_bytes(part[key]) for key in missing)
        return Need(num_entries, num_missing, num_bytes)

    def adopt(self, samples: Iterable[Sample], others: Sequence[TensorStore]) -> int:
        """Take over what other stores hold of some samples; how many entries that were.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        return sum(adopt(self.store, part.keys(), others) for part in self._by_key(samples))

    def _by_key(self, samples: Iterable[Sample]) -> Iterator[dict[str, Sample]]:
        """The samples in parts, by key; each key once in all."""
        seen: set[str] = set()
        part: dict[str, Sample] = {}
        for sample in samples:
            key = self.key(sample)
            if key not in seen:
                seen.add(key)
                part[key] = sample
            if len(part) == _SAMPLES_AT_ONCE:
                yield part
                part = {}
        if part:
            yield part

    def _unusable(self, dataset: ImageSource, filling: _Filling) -> tuple[UnusableSample, ...]:
        """Every sample without latents; several may share a key."""
        if not filling.reasons:
            return ()
        keyed = ((self.key(sample), sample) for sample in dataset.samples)
        return tuple(UnusableSample(sample, filling.reasons[key]) for key, sample in keyed if key in filling.reasons)

    def num_bytes(self, sample: Sample) -> int:
        """What the latents of `sample` take on the disk: mean and std in float32."""
        spec = self.family.spec
        return sample.crop.height * sample.crop.width // spec.vae_factor**2 * spec.latent_channels * 2 * 4


class OnDemandLatents:
    """Latents encoded when they are first asked for, then kept in the cache like any others.

    The values are those of `LatentCache.fill` with the same `batch_size`. Safe to use from several threads.

    Args:
        dataset: reads the images.
        vae: stays loaded.
        batch_size: images in every batch that the VAE sees.
        keeps: whether what is encoded is written.
    """

    def __init__(self, cache: LatentCache, dataset: ImageSource, vae: nn.Module, batch_size: int, keeps: bool = True):
        self.cache = cache
        self.dataset = dataset
        self.keeps = keeps
        self._encoder = BatchEncoder(cache.family, vae, batch_size)
        self._num_readers = num_readers(cache.family.device)
        self._reading = ThreadPoolExecutor(self._num_readers, "pictures-read")  # its threads start with the first one
        self._writer = StoreWriter(cache.store, max_entries=cache.write_batch_size)
        self._lock = threading.Lock()

    def __enter__(self) -> OnDemandLatents:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Write what was encoded and is not written yet."""
        self._reading.shutdown()
        self._writer.flush()

    def get(self, sample: Sample) -> LatentMoments:
        """As `LatentCache.get`, encoding what is missing or damaged.

        Raises:
            DataError: the image cannot be read or encoded.
        """
        return self.get_many([sample])[0]

    def get_many(self, samples: Sequence[Sample]) -> list[LatentMoments]:
        """`get` for each of `samples`; what is missing is encoded together."""
        with self._lock:
            wanted = {self.cache.key(sample): sample for sample in samples}
            found = {key: moments for key in wanted if (moments := self._find(key)) is not None}
            missing = {key: sample for key, sample in wanted.items() if key not in found}
            read = self.dataset.read_pixels
            tasks, num_ahead = ([sample] for sample in missing.values()), self._num_readers + self._encoder.batch_size
            images = read_ahead(tasks, read, self._reading, self._num_readers, num_ahead)
            for batch in batches_of_one_size(images, self._encoder.batch_size):
                for image, result in encode_batch(self._encoder, batch):
                    if isinstance(result, str):
                        raise _unusable(image.sample, result)
                    key = self.cache.key(image.sample)
                    found[key] = result
                    if self.keeps:
                        self._writer.put(key, _to_tensors(result))
        return [found[self.cache.key(sample)] for sample in samples]

    def _find(self, key: str) -> LatentMoments | None:
        tensors = self._writer.waiting(key)
        if tensors is None:
            try:
                tensors = self.cache.store.get(key)
            except (KeyError, DamagedEntry):
                return None
        return _to_moments(tensors)


class _Filling:
    """One pass over what is missing in a cache.

    Attributes:
        reasons: key -> why that image has no latents.
    """

    def __init__(self, cache: LatentCache, encoder: BatchEncoder):
        self.cache = cache
        self.encoder = encoder
        self.reasons: dict[str, str] = {}

    def run(
        self,
        todo: Mapping[str, Sample],
        read_pixels: Callable[[Sample], Tensor],
        num_threads: int,
        progress: Callable[[int], None],
    ) -> None:
        """Encode and write; `progress` is called with the number of samples of each batch."""
        # Batches hold one size; within a size the order of the dataset stays.
        samples = sorted(todo.values(), key=lambda sample: (sample.crop.height, sample.crop.width))
        num_ahead = num_threads + _BATCHES_AHEAD * self.encoder.batch_size
        keys = {id(sample): key for key, sample in todo.items()}
        with (
            ThreadPoolExecutor(1, "latents-write") as writing,
            StoreWriter(self.cache.store, max_entries=self.cache.write_batch_size, executor=writing) as writer,
            ThreadPoolExecutor(num_threads, "pictures-read") as reading,
        ):
            images = read_ahead(in_tasks(samples), read_pixels, reading, num_threads, num_ahead)
            for batch in batches_of_one_size(images, self.encoder.batch_size):
                for image, result in encode_batch(self.encoder, batch):
                    key = keys[id(image.sample)]
                    if isinstance(result, str):
                        self.reasons[key] = result
                    else:
                        writer.put(key, _to_tensors(result))
                progress(len(batch))


def _to_tensors(moments: LatentMoments) -> dict[str, Tensor]:
    # Copies: a row of a batch would keep the whole batch in memory until it is written.
    tensors = {"mean": moments.mean.clone()}
    return tensors if moments.std is None else {**tensors, "std": moments.std.clone()}


def _to_moments(tensors: Mapping[str, Tensor]) -> LatentMoments:
    return LatentMoments(tensors["mean"], tensors.get("std"))


def _unusable(sample: Sample, reason: str) -> DataError:
    return DataError(
        Problem(
            f"the image {sample.path} cannot be encoded: {reason}",
            key=sample.dataset_id,
            fix="repair the image or take it out of the dataset",
        )
    )
