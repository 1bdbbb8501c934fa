"""Mixing several streams into one order, in closed form: any place of it can be asked for, nothing is kept in memory.

The order is cut into T segments, and of a stream's K items the segment t gets floor((K(t + 1) + u) / T) -
floor((K t + u) / T), where u in [0, T) is a keyed phase (without it, streams of one item would all come last). Inside a
segment the order is a keyed permutation. So streams mix in proportion to their number of items all along, and finding a
place costs a binary search over T.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner.randomness import keyed_seed

# Items per segment: small enough that streams alternate closely, large enough that a segment is rarely worked out.
SEGMENT_ITEMS = 256


@dataclass(frozen=True)
class _Segment:
    """The items of one segment in order: which stream, and which of that stream's items."""

    first: int
    streams: NDArray[np.int64]
    items: NDArray[np.int64]


class Interleaving:
    """The mixed order of streams.

    Args:
        counts: items of each stream.
        key: of all draws.
    """

    def __init__(self, counts: Sequence[int], *key: int | str):
        self._counts = np.array(counts, dtype=np.int64)
        self._key = key
        self.total = int(self._counts.sum())
        self._num_segments = max(1, -(-self.total // SEGMENT_ITEMS))
        self._phases = generator(*key, "phase").integers(0, self._num_segments, size=len(self._counts))
        self._segment: _Segment | None = None

    def at(self, position: int) -> tuple[int, int]:
        """(stream, which of its items) at `position`, from 0.

        Raises:
            IndexError: `position` is not in [0, total).
        """
        if not 0 <= position < self.total:
            raise IndexError(f"position {position} is not within the {self.total} batches of an epoch")
        segment = self._segment_at(position)
        return int(segment.streams[position - segment.first]), int(segment.items[position - segment.first])

    def next_of(self, position: int, wanted: NDArray[np.bool_]) -> int | None:
        """The first place from `position` on that belongs to a wanted stream; None where there is none."""
        if not (wanted & (self._counts > 0)).any():
            return None
        while position < self.total:
            segment = self._segment_at(position)
            found = np.flatnonzero(wanted[segment.streams[position - segment.first :]])
            if len(found):
                return position + int(found[0])
            position = segment.first + len(segment.streams)
        return None

    def _segment_at(self, position: int) -> _Segment:
        segment = self._segment
        if segment and 0 <= position - segment.first < len(segment.streams):
            return segment
        low, high = 0, self._num_segments - 1
        while low < high:  # the first segment that ends after `position`
            middle = (low + high) // 2
            if int(self._counts_before(middle + 1).sum()) > position:
                high = middle
            else:
                low = middle + 1
        self._segment = segment = self._build_segment(low)
        return segment

    def _build_segment(self, index: int) -> _Segment:
        before = self._counts_before(index)
        counts = self._counts_before(index + 1) - before
        ordered = np.repeat(np.arange(len(self._counts)), counts)
        # Which item of its stream each entry is: a stream's items stay in order, whatever the shuffle does.
        within = np.arange(len(ordered)) - np.repeat(np.cumsum(counts) - counts, counts)
        ordered_items = within + np.repeat(before, counts)
        streams = ordered[permutation(len(ordered), *self._key, "segment", index)]
        items = np.empty_like(streams)
        items[np.argsort(streams, kind="stable")] = ordered_items
        return _Segment(int(before.sum()), streams, items)

    def _counts_before(self, segment: int) -> NDArray[np.int64]:
        """(streams,) items of each stream in all segments before `segment`."""
        return (self._counts * segment + self._phases) // self._num_segments


def permutation(length: int, *key: int | str) -> NDArray[np.int64]:
    """A keyed permutation of 0 .. length - 1."""
    return generator(*key).permutation(length)


def generator(*key: int | str) -> np.random.Generator:
    # PCG64 named outright: numpy may change what `default_rng` returns, and the order must not change with it.
    return np.random.Generator(np.random.PCG64(keyed_seed(*key)))
