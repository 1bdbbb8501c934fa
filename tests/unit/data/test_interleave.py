"""The mixed order of streams, asked for place by place and by stream."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from simpletuner.data.interleave import SEGMENT_ITEMS, Interleaving
from simpletuner.data.sampler import BatchPlan, Sampler
from simpletuner.data.schedule import Schedule
from simpletuner.randomness import keyed_seed


@pytest.mark.parametrize("seed", range(3))
def test_the_next_batch_of_a_stream_is_the_first_one_from_there_on(seed: int) -> None:
    """Read off the whole order, over the edges of its segments."""
    counts = (2 * SEGMENT_ITEMS, SEGMENT_ITEMS, 3)
    mix = Interleaving(counts, seed)
    order = [mix.at(position)[0] for position in range(mix.total)]
    for wanted in range(len(counts)):
        chosen = np.arange(len(counts)) == wanted
        for position in range(mix.total):
            expected = next((place for place in range(position, mix.total) if order[place] == wanted), None)
            assert mix.next_of(position, chosen) == expected


def drawn(*key: int | str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(keyed_seed(*key)))


def mixed(counts: list[int], *key: int | str) -> list[tuple[int, int]]:
    """(stream, which of its items) in the order of the formula at the top of `interleave.py`, with lists."""
    segments = max(1, math.ceil(sum(counts) / 256))
    phases = drawn(*key, "phase").integers(0, segments, size=len(counts)).tolist()
    order, taken = [], [0] * len(counts)
    for segment in range(segments):
        streams = []
        for stream, (count, phase) in enumerate(zip(counts, phases, strict=True)):
            share = (count * (segment + 1) + phase) // segments - (count * segment + phase) // segments
            streams += [stream] * share
        for place in drawn(*key, "segment", segment).permutation(len(streams)):
            stream = streams[place]
            order.append((stream, taken[stream]))
            taken[stream] += 1
    return order


@pytest.mark.parametrize("counts", [[1], [0, 3], [255, 1], [256, 1], [700, 90, 2, 5]])
def test_the_order_of_streams_is_that_of_the_formula(counts: list[int]) -> None:
    mix = Interleaving(counts, 9, "a")
    assert [mix.at(position) for position in range(mix.total)] == mixed(counts, 9, "a")
    for position in (-1, mix.total):
        with pytest.raises(IndexError, match=f"position {position} is not within the {sum(counts)} batches"):
            mix.at(position)


@dataclass
class Images:
    """A dataset with two sizes, of which each image comes twice in a round."""

    id: str
    with_replacement: bool = False
    repeats: int = 1
    batch_size: int | None = None
    schedule: Schedule = field(default_factory=Schedule)

    def buckets_in(self, round_number: int) -> dict[tuple[int, int], np.ndarray]:
        return {(64, 96): np.array([0, 2, 5]), (64, 64): np.array([1, 3, 4, 6, 7])}


def test_the_batches_of_a_run_are_those_of_the_formulas() -> None:
    """By lists and numpy's permutations: what a resumed run trains on must not change with this program."""
    datasets = [Images("a"), Images("b", with_replacement=True)]
    sampler = Sampler(datasets, 3, seed=7)
    streams = [((64, 64), [1, 3, 4, 6, 7]), ((64, 96), [0, 2, 5])]
    for epoch in (0, 1):
        expected = []
        # 10 of one size in threes are 4 batches, 6 of the other 2.
        for dataset, number in mixed([6, 6], 7, epoch, "datasets"):
            name = datasets[dataset].id
            stream, batch = mixed([4, 2], 7, name, epoch)[number]
            size, members = streams[stream]
            if datasets[dataset].with_replacement:
                places = drawn(7, name, epoch, *size, "draws", batch).integers(0, len(members), size=3)
                chosen = [members[place] for place in places]
            else:
                passes = [drawn(7, name, epoch, *size, number).permutation(len(members)) for number in (0, 1)]
                chosen = [members[place] for each in passes for place in each][3 * batch : 3 * batch + 3]
            expected.append(BatchPlan(epoch, len(expected), dataset, name, size, tuple(chosen), len(chosen), epoch))
        plans = [sampler.batch(epoch, position) for position in range(sampler.batches_in(epoch))]
        assert plans == expected
