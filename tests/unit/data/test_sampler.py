"""The order of samples: counts, mixing, random access, ranks, and its cost."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from simpletuner.data import interleave, rounds
from simpletuner.data.sampler import BatchPlan, Sampler, range_for_rank
from simpletuner.data.schedule import Schedule
from tests.costs import calls_in


@dataclass
class Fake:
    id: str
    sizes: dict[tuple[int, int], int]
    repeats: int = 0
    schedule: Schedule = field(default_factory=Schedule)
    batch_size: int | None = None
    with_replacement: bool = False
    buckets: dict[tuple[int, int], np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        start, self.buckets = 0, {}
        for size, count in self.sizes.items():
            self.buckets[size] = np.arange(start, start + count)
            start += count

    def buckets_in(self, round_number: int) -> dict[tuple[int, int], np.ndarray]:
        return self.buckets


MIXED = [
    Fake("a", {(64, 64): 7, (48, 80): 1, (80, 48): 13}, repeats=2),
    Fake("b", {(64, 64): 5}, repeats=0),
    Fake("c", {(128, 128): 3}, repeats=40),
]


def epoch_of(sampler: Sampler, epoch: int = 0, pad_to: int | None = None) -> list[BatchPlan]:
    return [sampler.batch(epoch, position, pad_to) for position in range(sampler.batches_in(epoch))]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 5, 64])
def test_each_sample_is_seen_exactly_once_more_than_its_repeats(batch_size: int) -> None:
    for epoch in (0, 3):
        seen = Counter(
            (plan.dataset_id, index)
            for plan in epoch_of(Sampler(MIXED, batch_size, seed=1), epoch)
            for index in plan.sample_indices
        )
        expected = {
            (dataset.id, index): dataset.repeats + 1
            for dataset in MIXED
            for index in range(sum(dataset.sizes.values()))
        }
        assert seen == expected


def test_a_batch_holds_one_dataset_and_one_size() -> None:
    for plan in epoch_of(Sampler(MIXED, 4, seed=1)):
        dataset = MIXED[plan.dataset_index]
        assert dataset.id == plan.dataset_id
        assert set(plan.sample_indices) <= set(dataset.buckets[plan.size].tolist())


def test_number_of_batches_by_hand() -> None:
    # a: 21/4 -> 6, 3/4 -> 1, 39/4 -> 10; b: 5/4 -> 2; c: 123/4 -> 31
    assert Sampler(MIXED, 4, seed=1).batches_in(0) == 6 + 1 + 10 + 2 + 31


def test_random_access_equals_going_through() -> None:
    straight = epoch_of(Sampler(MIXED, 3, seed=9), epoch=2)
    jumping = Sampler(MIXED, 3, seed=9)
    for position in np.random.default_rng(0).permutation(len(straight)).tolist():
        jumping.batch(5, position)
        assert jumping.batch(2, position) == straight[position]


def test_epochs_and_seeds_give_other_orders() -> None:
    orders = [
        [plan.sample_indices for plan in epoch_of(Sampler(MIXED, 3, seed), epoch)]
        for seed, epoch in [(1, 0), (1, 1), (2, 0)]
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_within_a_pass_no_sample_comes_twice() -> None:
    sampler = Sampler([Fake("a", {(64, 64): 10}, repeats=4)], 1, seed=3)
    seen = [plan.sample_indices[0] for plan in epoch_of(sampler)]
    passes = [seen[start : start + 10] for start in range(0, 50, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert passes[0] != passes[1]


def test_datasets_mix_in_proportion_all_along_the_epoch() -> None:
    sampler = Sampler([Fake("large", {(64, 64): 30_000}), Fake("small", {(64, 64): 3_000})], 1, seed=1)
    ids = np.array([plan.dataset_id == "small" for plan in epoch_of(sampler)])
    assert ids.sum() == 3_000
    counts = ids[:32_768].reshape(-1, 1024).sum(axis=1)  # 1/11 of 1024 is 93.1; cut to segments it varies by few
    assert counts.min() >= 85
    assert counts.max() <= 101


def test_streams_of_one_batch_are_spread_over_the_epoch() -> None:
    sizes = {(64, 64): 20_000} | {(64, 64 + number): 1 for number in range(1, 400)}
    sampler = Sampler([Fake("a", sizes)], 1, seed=1)
    places = [plan.position for plan in epoch_of(sampler) if plan.size != (64, 64)]
    assert 0.45 < np.mean(places) / sampler.batches_in(0) < 0.55  # uniform: 0.5, standard deviation 0.015


def test_a_short_batch_says_how_many_count() -> None:
    sampler = Sampler([Fake("a", {(64, 64): 5})], 4, seed=1)
    plain, padded = epoch_of(sampler), epoch_of(sampler, pad_to=4)
    assert [len(plan.sample_indices) for plan in plain] == [4, 1]
    assert [len(plan.sample_indices) for plan in padded] == [4, 4]
    assert [plan.num_real for plan in padded] == [4, 1]
    assert padded[1].loss_weights == (1.0, 0.0, 0.0, 0.0)
    assert padded[1].sample_indices[:1] == plain[1].sample_indices


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_together_make_the_same_global_batch(world_size: int) -> None:
    for plan in epoch_of(Sampler(MIXED, 8, seed=4)):
        ranges = [range_for_rank(len(plan.sample_indices), rank, world_size) for rank in range(world_size)]
        parts = [plan.sample_indices[part.start : part.stop] for part in ranges]
        assert sum(parts, ()) == plan.sample_indices
        slots = [
            slot for rank in range(world_size) for slot in range_for_rank(len(plan.sample_indices), rank, world_size)
        ]
        assert slots == list(range(len(plan.sample_indices)))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_the_order_does_not_follow_the_order_of_buckets_in_memory() -> None:
    turned = Fake("a", {(64, 64): 9, (48, 80): 4})
    turned.buckets = dict(reversed(turned.buckets.items()))
    assert epoch_of(Sampler([turned], 2, 1)) == epoch_of(Sampler([Fake("a", {(64, 64): 9, (48, 80): 4})], 2, 1))


def test_a_thousand_repeats_cost_no_memory() -> None:
    dataset = Fake("a", {(64, 64): 10_000}, repeats=1000)
    sampler = Sampler([dataset], 4, seed=1)
    assert sampler.batches_in(0) == 10_010_000 // 4
    tracemalloc.start()
    for position in (0, 1_234_567, sampler.batches_in(0) - 1):
        sampler.batch(0, position)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # two permutations of 10 000 are 160 kB; ten million occurrences would be 80 MB


def test_draws_with_replacement_are_independent_and_fill_every_batch() -> None:
    """Ten images in batches of four are three batches of four; over many rounds each image comes equally often."""
    dataset = Fake("a", {(64, 64): 10}, with_replacement=True)
    sampler = Sampler([dataset], 4, seed=1)
    plans = [plan for epoch in range(1000) for plan in epoch_of(sampler, epoch)]
    assert {(len(plan.sample_indices), plan.num_real) for plan in plans} == {(4, 4)}
    counts = Counter(index for plan in plans for index in plan.sample_indices)
    # 12,000 draws of ten: 1200 each, with a deviation of 33.
    assert all(abs(counts[index] - 1200) < 4 * 33 for index in range(10))
    # In a batch of four independent draws, all differ with probability 10 * 9 * 8 * 7 / 10 ** 4.
    all_differ = sum(len(set(plan.sample_indices)) == 4 for plan in plans) / len(plans)
    assert abs(all_differ - 0.504) < 4 * 0.0092
    # Nor are the batches of a round alike, but for one in ten thousand.
    assert sum(plans[i].sample_indices == plans[i + 1].sample_indices for i in range(0, 3000, 3)) < 5
    assert Sampler([dataset], 4, seed=1).batch(7, 2).sample_indices == plans[7 * 3 + 2].sample_indices
    assert Sampler([dataset], 4, seed=2).batch(7, 2).sample_indices != plans[7 * 3 + 2].sample_indices


def test_one_image_with_repeats_fills_batches() -> None:
    plan = Sampler([Fake("a", {(64, 64): 1}, repeats=9)], 4, seed=1).batch(0, 0)
    assert plan.sample_indices == (0, 0, 0, 0)


def test_the_cost_of_a_batch_does_not_grow_with_the_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    shuffled: list[int] = []
    for module in (rounds, interleave):
        permutation = module.permutation
        monkeypatch.setattr(
            module, "permutation", lambda length, *key, make=permutation: shuffled.append(length) or make(length, *key)
        )

    def cost(num_samples: int) -> int:
        sampler = Sampler([Fake("a", {(64, 64): num_samples}, repeats=1000)], 4, seed=1)
        sampler.batch(0, 0)  # the permutation of the pass
        shuffled.clear()
        return calls_in(lambda: [sampler.batch(0, position) for position in range(1, 600)])

    small, large = cost(2_400), cost(1_000_000)
    assert large < 2 * small  # by size it would be 400 times
    assert shuffled
    assert sum(shuffled) < 8 * interleave.SEGMENT_ITEMS  # and of the images none again


def test_positions_outside_the_epoch_are_refused() -> None:
    sampler = Sampler(MIXED, 4, seed=1)
    last = sampler.batches_in(0) - 1
    assert (sampler.after(0, 3), sampler.after(0, last)) == ((0, 4), (1, 0))
    for position in (-1, sampler.batches_in(0)):
        with pytest.raises(IndexError):
            sampler.batch(0, position)


def test_every_pass_and_every_round_has_an_order_of_its_own() -> None:
    order = rounds.DatasetOrder(Fake("a", {(64, 64): 40}, repeats=1), 40, seed=1)
    orders = [order.batch(number, place).sample_indices for number in range(2) for place in range(2)]
    assert all(sorted(each) == list(range(40)) for each in orders)
    assert len(set(orders)) == 4


def test_a_stream_keeps_its_order_over_many_segments() -> None:
    counts = [700, 30, 1]
    mix = interleave.Interleaving(counts, 5, "x")
    places = [mix.at(position) for position in range(mix.total)]
    for stream, count in enumerate(counts):
        assert [item for found, item in places if found == stream] == list(range(count))


def test_datasets_and_sizes_are_mixed_anew_in_each_epoch_and_each_round() -> None:
    sampler = Sampler([Fake("a", {(64, 64): 20, (48, 80): 20}), Fake("b", {(64, 64): 40})], 1, seed=1)
    epochs = [epoch_of(sampler, epoch) for epoch in range(3)]
    assert len({tuple(plan.dataset_id for plan in plans) for plans in epochs}) == 3
    assert len({tuple(plan.size for plan in plans if plan.dataset_id == "a") for plans in epochs}) == 3


@pytest.mark.parametrize("with_replacement", [False, True])
def test_each_dataset_and_each_size_has_an_order_of_its_own(with_replacement: bool) -> None:
    sizes = {(64, 64): 40, (48, 80): 40}
    datasets = [Fake(name, sizes, with_replacement=with_replacement) for name in ("a", "b")]
    plans = epoch_of(Sampler(datasets, 40, seed=1))
    orders = {tuple(index % 40 for index in plan.sample_indices) for plan in plans}
    assert len(plans) == len(orders) == 4


def test_filling_of_drawn_batches_does_not_count() -> None:
    sampler = Sampler([Fake("a", {(64, 64): 5}, with_replacement=True)], 3, seed=1)
    for plan in epoch_of(sampler, pad_to=4):
        assert (len(plan.sample_indices), plan.num_real) == (4, 3)
    assert sampler.batches_in(0) == 2


def test_an_epoch_without_a_batch_is_over_at_once() -> None:
    sampler = Sampler([Fake("a", {(64, 64): 1}, schedule=Schedule(0.25))], 1, seed=1)
    assert [sampler.batches_in(epoch) for epoch in range(4)] == [0, 0, 0, 1]
    assert sampler.epochs_at(1, 0) == 1
    assert sampler.after(3, 0) == (4, 0)
    with pytest.raises(ValueError, match="at least 1"):
        Sampler([], 0, seed=1)
