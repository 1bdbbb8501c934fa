"""The order of one dataset: rounds in which each image occurs `repeats` + 1 times, cut into batches of one size.

One stream per bucket. The occurrences of a stream are `repeats` + 1 passes over its images, each a keyed permutation,
laid end to end; batch j takes occurrences [jB, (j + 1)B). Nothing is ever materialised but the permutations of the
passes in use. A dataset may have its images drawn with replacement instead: then each batch is full, and its images are
independent keyed draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.buckets import BucketSize
from simpletuner.data.interleave import Interleaving, generator, permutation
from simpletuner.data.schedule import Schedule


class SampledDataset(Protocol):
    """What the sampler needs to know of a dataset."""

    @property
    def id(self) -> str: ...

    @property
    def repeats(self) -> int: ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def with_replacement(self) -> bool:
        """Whether each image of a batch is a draw of its own."""
        ...

    @property
    def batch_size(self) -> int | None:
        """Of one process; None takes that of the run."""
        ...

    def buckets_in(self, round_number: int) -> Mapping[BucketSize, NDArray[np.int64]]:
        """(height, width) -> indices of images, in a round; the same object where nothing differs."""
        ...


@dataclass(frozen=True)
class RoundBatch:
    """One batch of a round: its size, its samples, and how many of them count."""

    size: BucketSize
    sample_indices: tuple[int, ...]
    num_real: int


@dataclass(frozen=True)
class _Stream:
    size: BucketSize
    members: NDArray[np.int64]
    num_occurrences: int
    num_batches: int


@dataclass(frozen=True)
class _Round:
    number: int
    buckets: Mapping[BucketSize, NDArray[np.int64]]
    streams: tuple[_Stream, ...]
    mix: Interleaving


class DatasetOrder:
    """The rounds of one dataset; a pure function of the dataset, the seed, and the place that is asked for.

    Args:
        batch_size: samples per global micro-batch.
        fills_batches: the last batch of a bucket is filled up with further images of the bucket, which count, instead
            of being short.
    """

    def __init__(self, dataset: SampledDataset, batch_size: int, seed: int, fills_batches: bool = False):
        self.dataset = dataset
        self.batch_size = batch_size
        self.fills_batches = fills_batches
        self._key = (seed, dataset.id)
        self._rounds: dict[int, _Round] = {}
        self._permutations: dict[BucketSize, dict[tuple[int, int], NDArray[np.int64]]] = {}

    def batches_in(self, round_number: int) -> int:
        known = self._rounds.get(round_number)
        if known is None:
            known = self._like(self.dataset.buckets_in(round_number)) or self._round(round_number)
        return known.mix.total

    def batch(self, round_number: int, position: int, pad_to: int | None = None) -> RoundBatch:
        """The batch at `position` of a round.

        Args:
            pad_to: fill a short batch up to so many samples; the filling does not count.
        """
        current = self._round(round_number)
        stream_index, number = current.mix.at(position)
        stream = current.streams[stream_index]
        if self.dataset.with_replacement:
            length = max(self.batch_size, pad_to or 0)
            return RoundBatch(stream.size, self._draws(round_number, stream, number, length), self.batch_size)
        start = number * self.batch_size
        num_real = self.batch_size if self.fills_batches else min(self.batch_size, stream.num_occurrences - start)
        indices = self._occurrences(round_number, stream, start, max(num_real, pad_to or 0))
        return RoundBatch(stream.size, indices, num_real)

    def _round(self, number: int) -> _Round:
        known = self._rounds.get(number)
        if known is not None:
            return known
        buckets = self.dataset.buckets_in(number)
        same = self._like(buckets)
        streams = same.streams if same else self._streams(buckets)
        made = _Round(number, buckets, streams, Interleaving([s.num_batches for s in streams], *self._key, number))
        # An epoch can end one round and begin the next; older rounds are dropped.
        self._rounds = dict([*list(self._rounds.items())[-1:], (number, made)])
        return made

    def _like(self, buckets: Mapping[BucketSize, NDArray[np.int64]]) -> _Round | None:
        """A round over these very buckets: it has the same streams in another order."""
        return next((each for each in list(self._rounds.values()) if each.buckets is buckets), None)

    def _streams(self, buckets: Mapping[BucketSize, NDArray[np.int64]]) -> tuple[_Stream, ...]:
        streams = []
        for size, members in sorted(buckets.items()):
            occurrences = len(members) * (self.dataset.repeats + 1)
            if occurrences:
                streams.append(_Stream(size, members, occurrences, -(-occurrences // self.batch_size)))
        return tuple(streams)

    def _draws(self, round_number: int, stream: _Stream, number: int, length: int) -> tuple[int, ...]:
        draws = generator(*self._key, round_number, *stream.size, "draws", number)
        return tuple(stream.members[draws.integers(0, len(stream.members), size=length)].tolist())

    def _occurrences(self, round_number: int, stream: _Stream, start: int, length: int) -> tuple[int, ...]:
        indices: list[int] = []
        while len(indices) < length:
            number, offset = divmod(start + len(indices), len(stream.members))
            order = self._pass_order(round_number, stream, number)
            chosen = order[offset : offset + length - len(indices)]
            indices.extend(stream.members[chosen].tolist())
        return tuple(indices)

    def _pass_order(self, round_number: int, stream: _Stream, number: int) -> NDArray[np.int64]:
        kept = self._permutations.get(stream.size, {})
        order = kept.get((round_number, number))
        if order is None:
            order = permutation(len(stream.members), *self._key, round_number, *stream.size, number)
            # A batch reaches over the end of a pass into the next one, so two are kept and older ones dropped.
            recent = list(kept.items())[-1:]
            self._permutations[stream.size] = dict([*recent, ((round_number, number), order)])
        return order
