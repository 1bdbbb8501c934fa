"""Which samples make up each batch: a pure function of (seed, epoch, position) and of what the datasets hold.

The state of the sampler is two integers, so a resume needs nothing else, and any batch can be asked for in any order.
The global batch is formed here; ranks take their slice of it (`slice_for_rank`), so the order survives a change of the
number of ranks.

One stream per (dataset, bucket). Over an epoch a sample occurs `repeats` + 1 times: the occurrences of a stream are
that many passes, each a permutation keyed by (seed, epoch, dataset, bucket, pass), laid end to end; batch j takes
occurrences [jB, (j + 1)B). Nothing is ever materialised but the permutations of the passes in use.

The streams are interleaved in closed form. The epoch is cut into T segments, and of a stream's K batches the segment t
gets floor((K(t + 1) + u) / T) - floor((K t + u) / T), where u in [0, T) is a keyed phase (without it, streams of one
batch would all come last). Inside a segment the order is a keyed permutation. So streams mix in proportion to their
number of batches all along the epoch, and finding a batch costs a binary search over T.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from simpletuner.randomness import keyed_seed

Item = TypeVar("Item")
Size = tuple[int, int]

# Batches per segment: small enough that streams alternate closely, large enough that a segment is rarely worked out.
SEGMENT_BATCHES = 256


class SampledDataset(Protocol):
    """What the sampler needs to know of a dataset."""

    @property
    def id(self) -> str: ...

    @property
    def repeats(self) -> int: ...

    @property
    def buckets(self) -> Mapping[Size, NDArray[np.int64]]: ...


@dataclass(frozen=True)
class BatchPlan:
    """One global batch: samples of one dataset and one size.

    Args:
        epoch: from 0.
        position: place in the epoch, from 0.
        dataset_index: index into the sampler's datasets.
        dataset_id: its id.
        size: (height, width) in pixels.
        sample_indices: indices into the dataset's `samples`; the last ones may only fill the batch up.
        num_real: how many count; the others carry weight 0.
    """

    epoch: int
    position: int
    dataset_index: int
    dataset_id: str
    size: Size
    sample_indices: tuple[int, ...]
    num_real: int

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """1 for each sample that counts, 0 for each that fills up."""
        return tuple(1.0 if slot < self.num_real else 0.0 for slot in range(len(self.sample_indices)))


@dataclass(frozen=True)
class _Stream:
    dataset_index: int
    dataset_id: str
    size: Size
    members: NDArray[np.int64]
    num_occurrences: int
    num_batches: int


@dataclass(frozen=True)
class _Segment:
    """The batches of one segment in order: which stream, and which of that stream's batches."""

    epoch: int
    first: int
    streams: NDArray[np.int64]
    batches: NDArray[np.int64]


class Sampler:
    """The order in which samples are trained on.

    Args:
        datasets: in a fixed order; ids differ.
        batch_size: samples per global micro-batch (per-device batch size times ranks).
        seed: of the run.
    """

    def __init__(self, datasets: Sequence[SampledDataset], batch_size: int, seed: int):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self.seed = seed
        self._streams = [
            _stream(index, dataset, size, members, batch_size)
            for index, dataset in enumerate(datasets)
            for size, members in sorted(dataset.buckets.items())
            if len(members)
        ]
        self._num_batches = np.array([stream.num_batches for stream in self._streams], dtype=np.int64)
        self.batches_per_epoch = int(self._num_batches.sum())
        self._num_segments = max(1, -(-self.batches_per_epoch // SEGMENT_BATCHES))
        self._segment: _Segment | None = None
        self._permutations: dict[int, dict[tuple[int, int], NDArray[np.int64]]] = {}

    def locate(self, batch_index: int) -> tuple[int, int]:
        """(epoch, position) of the batch with this index, counted from the start of training."""
        return divmod(batch_index, self.batches_per_epoch)

    def batch(self, epoch: int, position: int, pad_to: int | None = None) -> BatchPlan:
        """The batch at `position` of `epoch`.

        Args:
            pad_to: fill a short batch up to so many samples; the filling carries weight 0.

        Raises:
            IndexError: `position` is not in [0, batches_per_epoch).
        """
        if not 0 <= position < self.batches_per_epoch:
            raise IndexError(f"position {position} is not within the {self.batches_per_epoch} batches of an epoch")
        segment = self._segment_at(epoch, position)
        stream_index = int(segment.streams[position - segment.first])
        stream = self._streams[stream_index]
        start = int(segment.batches[position - segment.first]) * self.batch_size
        num_real = min(self.batch_size, stream.num_occurrences - start)
        length = max(num_real, pad_to or 0)
        return BatchPlan(
            epoch=epoch,
            position=position,
            dataset_index=stream.dataset_index,
            dataset_id=stream.dataset_id,
            size=stream.size,
            sample_indices=self._occurrences(epoch, stream_index, start, length),
            num_real=num_real,
        )

    def _segment_at(self, epoch: int, position: int) -> _Segment:
        segment = self._segment
        if segment and segment.epoch == epoch and 0 <= position - segment.first < len(segment.streams):
            return segment
        phases = self._phases(epoch)
        low, high = 0, self._num_segments - 1
        while low < high:  # the first segment that ends after `position`
            middle = (low + high) // 2
            if int(self._counts_before(middle + 1, phases).sum()) > position:
                high = middle
            else:
                low = middle + 1
        self._segment = self._build_segment(epoch, low, phases)
        return self._segment

    def _build_segment(self, epoch: int, index: int, phases: NDArray[np.int64]) -> _Segment:
        before = self._counts_before(index, phases)
        counts = self._counts_before(index + 1, phases) - before
        ordered = np.repeat(np.arange(len(self._streams)), counts)
        # Which batch of its stream each entry is: the stream's batches stay in order, whatever the shuffle does.
        within = np.arange(len(ordered)) - np.repeat(np.cumsum(counts) - counts, counts)
        ordered_batches = within + np.repeat(before, counts)
        streams = ordered[_permutation(len(ordered), self.seed, epoch, "segment", index)]
        batches = np.empty_like(streams)
        batches[np.argsort(streams, kind="stable")] = ordered_batches
        return _Segment(epoch, int(before.sum()), streams, batches)

    def _phases(self, epoch: int) -> NDArray[np.int64]:
        generator = _generator(self.seed, epoch, "phase")
        return generator.integers(0, self._num_segments, size=len(self._streams))

    def _counts_before(self, segment: int, phases: NDArray[np.int64]) -> NDArray[np.int64]:
        """(streams,) batches of each stream in all segments before `segment`."""
        return (self._num_batches * segment + phases) // self._num_segments

    def _occurrences(self, epoch: int, stream_index: int, start: int, length: int) -> tuple[int, ...]:
        stream = self._streams[stream_index]
        indices: list[int] = []
        while len(indices) < length:
            number, offset = divmod(start + len(indices), len(stream.members))
            order = self._pass_order(epoch, stream_index, number)
            chosen = order[offset : offset + length - len(indices)]
            indices.extend(stream.members[chosen].tolist())
        return tuple(indices)

    def _pass_order(self, epoch: int, stream_index: int, number: int) -> NDArray[np.int64]:
        kept = self._permutations.get(stream_index, {})
        order = kept.get((epoch, number))
        if order is None:
            stream = self._streams[stream_index]
            height, width = stream.size
            order = _permutation(len(stream.members), self.seed, epoch, stream.dataset_id, height, width, number)
            # A batch reaches over the end of a pass into the next one, so two are kept and older ones dropped.
            recent = list(kept.items())[-1:]
            self._permutations[stream_index] = dict([*recent, ((epoch, number), order)])
        return order


def slice_for_rank(items: Sequence[Item], rank: int, world_size: int) -> Sequence[Item]:
    """The part of a global batch that `rank` works on: contiguous, lengths differing by one at most."""
    span = range_for_rank(len(items), rank, world_size)
    return items[span.start : span.stop]


def range_for_rank(length: int, rank: int, world_size: int) -> range:
    """The slots of a global batch that belong to `rank`; the ranks together cover each slot once."""
    return range(length * rank // world_size, length * (rank + 1) // world_size)


def _stream(
    dataset_index: int, dataset: SampledDataset, size: Size, members: NDArray[np.int64], batch_size: int
) -> _Stream:
    num_occurrences = len(members) * (dataset.repeats + 1)
    num_batches = -(-num_occurrences // batch_size)
    return _Stream(dataset_index, dataset.id, size, members, num_occurrences, num_batches)


def _permutation(length: int, *key: int | str) -> NDArray[np.int64]:
    return _generator(*key).permutation(length)


def _generator(*key: int | str) -> np.random.Generator:
    # PCG64 named outright: numpy may change what `default_rng` returns, and the order must not change with it.
    return np.random.Generator(np.random.PCG64(keyed_seed(*key)))
