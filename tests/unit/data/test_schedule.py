"""Weights and schedules: counts worked out by hand, exact over epochs, equal however the order is asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from simpletuner.data.sampler import BatchPlan, Sampler, range_for_rank
from simpletuner.data.schedule import Schedule
from simpletuner.errors import ConfigError
from tests.costs import calls_in


@dataclass
class Fake:
    id: str
    count: int
    schedule: Schedule = field(default_factory=Schedule)
    repeats: int = 0
    with_replacement: bool = False
    batch_size: int | None = None

    def __post_init__(self) -> None:
        half = self.count // 2
        self.buckets = {(64, 64): np.arange(half), (48, 80): np.arange(half, self.count)}

    def buckets_in(self, round_number: int) -> dict[tuple[int, int], np.ndarray]:
        return self.buckets


def epoch_of(sampler: Sampler, epoch: int) -> list[BatchPlan]:
    return [sampler.batch(epoch, position) for position in range(sampler.batches_in(epoch))]


def walk(sampler: Sampler, num_steps: int, accumulation: int = 1) -> list[list[BatchPlan]]:
    """The batches of each optimizer step, as training asks for them."""
    steps, epoch, position = [], 0, 0
    for step in range(num_steps):
        plans = []
        for _ in range(accumulation):
            epoch, position = sampler.seek(epoch, position, step)
            plans.append(sampler.batch(epoch, position))
            epoch, position = sampler.after(epoch, position)
        steps.append(plans)
    return steps


@pytest.mark.parametrize("probability", [0.1, 0.25, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.3])
def test_each_epoch_holds_the_share_of_a_dataset_within_one_batch(probability: float) -> None:
    # 40 images in two buckets of 20, batches of 3: 7 + 7 = 14 batches in a round.
    sampler = Sampler([Fake("a", 40, Schedule(probability)), Fake("b", 30)], 3, seed=1)
    taken = 0
    for epoch in range(20):
        count = sum(plan.dataset_id == "a" for plan in epoch_of(sampler, epoch))
        taken += count
        assert abs(count - 14 * probability) < 1
        assert abs(taken - 14 * probability * (epoch + 1)) < 1
        assert sum(plan.dataset_id == "b" for plan in epoch_of(sampler, epoch)) == 10


def test_with_a_probability_of_a_quarter_four_epochs_show_each_image_once() -> None:
    sampler = Sampler([Fake("a", 40, Schedule(0.25))], 3, seed=1)
    seen = Counter(index for epoch in range(4) for plan in epoch_of(sampler, epoch) for index in plan.sample_indices)
    assert seen == dict.fromkeys(range(40), 1)
    again = Counter(
        index for epoch in range(4, 8) for plan in epoch_of(sampler, epoch) for index in plan.sample_indices
    )
    assert again == seen


def test_a_probability_of_two_shows_each_image_twice_in_rounds_of_their_own() -> None:
    sampler = Sampler([Fake("a", 40, Schedule(2), repeats=1)], 3, seed=1)
    plans = epoch_of(sampler, 0)
    assert {plan.round_number for plan in plans} == {0, 1}
    seen = Counter(index for plan in plans for index in plan.sample_indices)
    assert seen == dict.fromkeys(range(40), 4)  # two rounds, each with one repeat
    assert {plan.round_number for plan in epoch_of(sampler, 1)} == {2, 3}


def test_many_rounds_in_an_epoch_cost_no_more_than_one() -> None:
    def cost(probability: float) -> int:
        sampler = Sampler([Fake("a", 6, Schedule(probability))], 2, seed=1)
        last = sampler.batches_in(0) - 1
        sampler.batch(0, last)
        return calls_in(lambda: [sampler.batch(0, last) for _ in range(200)])

    assert cost(500) < 2 * cost(1)


def test_a_probability_of_zero_leaves_a_dataset_out() -> None:
    sampler = Sampler([Fake("a", 40, Schedule(0)), Fake("b", 4)], 2, seed=1)
    assert {plan.dataset_id for plan in epoch_of(sampler, 0)} == {"b"}


def test_epochs_outside_of_a_schedule_hold_none_of_the_dataset() -> None:
    late = Fake("late", 6, Schedule(start_epoch=3, end_epoch=4))
    sampler = Sampler([Fake("always", 6), late], 3, seed=1)
    counts = [Counter(plan.dataset_id for plan in epoch_of(sampler, epoch)) for epoch in range(5)]
    assert [count["late"] for count in counts] == [0, 0, 2, 2, 0]
    assert [count["always"] for count in counts] == [2] * 5
    assert sampler.batches_before(2.5) == 2 + 2 + 2  # half of the third epoch's four
    assert sampler.epochs_at(2, 1) == 2.25


def test_a_dataset_takes_part_in_exactly_its_steps() -> None:
    """The example of the peer's documentation: one dataset for the first steps, another from there on."""
    early, late = Fake("early", 10, Schedule(end_step=7)), Fake("late", 8, Schedule(start_step=7))
    steps = walk(Sampler([early, late], 2, seed=1), 30, accumulation=2)
    ids = [{plan.dataset_id for plan in plans} for plans in steps]
    assert ids[:6] == [{"early"}] * 6
    assert ids[6] <= {"early", "late"}
    assert ids[7:] == [{"late"}] * 23


@pytest.mark.slow
def test_a_large_dataset_that_waits_does_not_make_the_small_one_slow() -> None:
    sampler = Sampler([Fake("small", 4), Fake("large", 2_000_000, Schedule(start_step=1000))], 2, seed=1)
    steps: list[list[BatchPlan]] = []
    calls = calls_in(lambda: steps.extend(walk(sampler, 3)))
    assert {plan.dataset_id for plans in steps for plan in plans} == {"small"}
    assert calls < 1_000_000  # of the million batches that wait, none is looked at by itself


def test_the_order_can_be_taken_up_at_any_step() -> None:
    def datasets() -> list[Fake]:
        return [
            Fake("a", 10, Schedule(0.3)),
            Fake("b", 7, Schedule(1.5, start_step=4, end_step=11), batch_size=3),
            Fake("c", 5, Schedule(start_epoch=2)),
        ]

    straight = walk(Sampler(datasets(), 2, seed=5), 25)
    epoch = position = 0
    for step in range(25):
        fresh = Sampler(datasets(), 2, seed=5)
        epoch, position = fresh.seek(epoch, position, step)
        assert [fresh.batch(epoch, position)] == straight[step]
        epoch, position = fresh.after(epoch, position)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_make_the_batches_of_one(world_size: int) -> None:
    """One rank with batches of 8, or more ranks with smaller ones: the same global batches."""
    datasets = [Fake("a", 30, Schedule(0.4)), Fake("b", 21, batch_size=4 // world_size)]
    alone = walk(Sampler([datasets[0], Fake("b", 21, batch_size=4)], 8, seed=2), 30)
    together = walk(Sampler(datasets, 8, seed=2, num_ranks=world_size), 30)
    for (one,), (many,) in zip(alone, together, strict=True):
        ranges = [range_for_rank(len(many.sample_indices), rank, world_size) for rank in range(world_size)]
        parts = [many.sample_indices[part.start : part.stop] for part in ranges]
        assert sum(parts, ()) == one.sample_indices


def test_a_dataset_has_a_batch_size_of_its_own() -> None:
    plans = epoch_of(Sampler([Fake("a", 12, batch_size=1), Fake("b", 12)], 3, seed=1), 0)
    assert Counter((plan.dataset_id, len(plan.sample_indices)) for plan in plans) == {("a", 1): 12, ("b", 3): 4}


def test_short_batches_are_filled_with_images_that_count_where_that_is_asked_for() -> None:
    plans = epoch_of(Sampler([Fake("a", 5)], 4, seed=1, fills_batches=True), 0)
    assert [(len(plan.sample_indices), plan.num_real) for plan in plans] == [(4, 4)] * 2
    for plan in plans:  # a bucket of 2 and one of 3: nothing but its own images
        assert set(plan.sample_indices) == ({0, 1} if plan.size == (64, 64) else {2, 3, 4})


def test_a_time_without_a_dataset_is_an_error_and_no_endless_search() -> None:
    sampler = Sampler([Fake("a", 4, Schedule(end_step=3)), Fake("b", 4, Schedule(start_step=6))], 2, seed=1)
    with pytest.raises(ConfigError, match="at step 4, from epoch 2 on, no dataset takes part"):
        walk(sampler, 8)
    with pytest.raises(ConfigError, match="no dataset takes part"):
        walk(Sampler([Fake("a", 4, Schedule(end_epoch=2))], 2, seed=1), 9)


def test_epochs_without_a_batch_are_passed_over() -> None:
    steps = walk(Sampler([Fake("a", 2, Schedule(0.2))], 2, seed=1), 4)  # two batches in a round: 0.4 in an epoch
    assert [plans[0].epoch for plans in steps] == [2, 4, 7, 9]


def test_mixed_evenly_a_small_dataset_comes_as_often_as_a_large_one() -> None:
    # Batches of 2: 60 and 4 images in two buckets each are 30 and 2 batches; 32 in an epoch, 16 of each.
    sampler = Sampler([Fake("large", 60), Fake("small", 4)], 2, seed=1, mixes_evenly=True)
    seen: Counter[int] = Counter()
    for epoch in range(15):
        plans = epoch_of(sampler, epoch)
        assert Counter(plan.dataset_id for plan in plans) == {"large": 16, "small": 16}
        seen.update(index for plan in plans if plan.dataset_id == "large" for index in plan.sample_indices)
    # 15 epochs of 16 batches are exactly eight rounds: each image has had its turns.
    assert set(seen.values()) == {8}
    assert len(seen) == 60


def test_mixed_evenly_shares_are_as_the_probabilities() -> None:
    # Weights 3 and 1 over 30 and 10 batches: (3 * 30 + 1 * 10) = 100 in an epoch, 75 and 25.
    datasets = [Fake("a", 60, Schedule(3.0)), Fake("b", 20, Schedule(1.0))]
    sampler = Sampler(datasets, 2, seed=1, mixes_evenly=True)
    assert Counter(plan.dataset_id for plan in epoch_of(sampler, 0)) == {"a": 75, "b": 25}


def test_the_first_and_the_last_step_and_epoch_of_a_schedule_by_hand() -> None:
    """Steps 3 to 5 follow 2, 3 and 4 steps that were taken; epochs are asked for from 0."""
    schedule = Schedule(start_epoch=2, end_epoch=3, start_step=3, end_step=5)
    assert [taken for taken in range(8) if schedule.in_step(taken)] == [2, 3, 4]
    assert [epoch for epoch in range(6) if schedule.in_epoch(epoch)] == [1, 2]
    assert all(Schedule().in_step(taken) and Schedule().in_epoch(taken) for taken in range(3))


def test_a_dataset_that_begins_in_epoch_0_or_1_has_been_through_one_round_an_epoch() -> None:
    assert [Schedule(start_epoch=first).rounds_before(3) for first in (0, 1, 2, 4)] == [3, 3, 2, 0]


def test_the_next_turn_of_a_rare_dataset_is_found_from_right_behind_its_last() -> None:
    """One batch, and a quarter of a round an epoch: of the first eight epochs the fourth and the eighth have it."""
    sampler = Sampler([Fake("often", 4, Schedule(end_step=1)), Fake("rare", 1, Schedule(0.25))], 3, seed=1)
    [first] = [plan for plan in epoch_of(sampler, 3) if plan.dataset_id == "rare"]
    epoch, position = sampler.seek(3, first.position + 1, step=9)
    assert (epoch, sampler.batch(epoch, position).dataset_id) == (7, "rare")


def test_half_an_epoch_is_half_of_that_epoch() -> None:
    """Epochs of 2, 2, 2 and 3 batches."""
    sampler = Sampler([Fake("often", 4), Fake("rare", 1, Schedule(0.25))], 3, seed=1)
    assert [sampler.batches_in(epoch) for epoch in range(4)] == [2, 2, 2, 3]
    assert [sampler.batches_before(epochs) for epochs in (1.5, 3, 3.5, 4)] == [3, 6, 7.5, 9]
