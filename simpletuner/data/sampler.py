"""Which samples make up each batch: a pure function of (seed, epoch, position) and of what the datasets hold.

The state of the sampler is two integers, so a resume needs nothing else, and any batch can be asked for in any order.
The global batch is formed here; each process takes its part of it (`range_for_rank`), so the order
survives a change of the number of processes.

Each dataset is an endless sequence of rounds (`rounds.py`). An epoch takes `probability` rounds of each dataset that
takes part in it, from where the epoch before left off: of K batches per round, epoch e gets those from floor(p e K) to
floor(p (e + 1) K). So the shares hold within one batch in every epoch, and every image has its turn whatever the
probability. The batches of the datasets are mixed in proportion to their numbers (`interleave.py`). Steps at which a
dataset does not take part (`start_step`, `end_step`) pass its batches over.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

from simpletuner.config.options import TrainConfig
from simpletuner.data.buckets import BucketSize
from simpletuner.data.interleave import Interleaving
from simpletuner.data.rounds import DatasetOrder, SampledDataset
from simpletuner.errors import ConfigError, Problem


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
        round_number: round of the dataset, from 0: decides what is resampled each time that a dataset is gone through.
    """

    epoch: int
    position: int
    dataset_index: int
    dataset_id: str
    size: BucketSize
    sample_indices: tuple[int, ...]
    num_real: int
    round_number: int = 0

    @property
    def loss_weights(self) -> tuple[float, ...]:
        """1 for each sample that counts, 0 for each that fills up."""
        return tuple(1.0 if slot < self.num_real else 0.0 for slot in range(len(self.sample_indices)))


@dataclass(frozen=True)
class _Share:
    """What an epoch takes of a dataset: `count` batches from batch `start` of round `first_round` on.

    Args:
        ends: batches of the first round, of the first two, and so on.
    """

    first_round: int = 0
    start: int = 0
    count: int = 0
    ends: tuple[int, ...] = ()

    def place(self, number: int) -> tuple[int, int]:
        """(round, batch in it) of a batch of the epoch, from 0."""
        index = bisect.bisect_right(self.ends, self.start + number)
        return self.first_round + index, self.start + number - (self.ends[index - 1] if index else 0)


class Sampler:
    """The order in which samples are trained on.

    Args:
        datasets: in a fixed order; ids differ.
        batch_size: samples per global micro-batch (per-device batch size times ranks).
        seed: of the run.
        num_ranks: multiplies the batch size of datasets that have their own.
        fills_batches: `DatasetOrder`.
        mixes_evenly: the shares of datasets in an epoch are as their `probability`, whatever their sizes
            (`data_backend_sampling: uniform`); otherwise each gives `probability` rounds.
    """

    def __init__(
        self,
        datasets: Sequence[SampledDataset],
        batch_size: int,
        seed: int,
        num_ranks: int = 1,
        fills_batches: bool = False,
        mixes_evenly: bool = False,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self.seed = seed
        self.datasets = list(datasets)
        self._orders = [
            DatasetOrder(
                dataset, dataset.batch_size * num_ranks if dataset.batch_size else batch_size, seed, fills_batches
            )
            for dataset in self.datasets
        ]
        self._rates = self._even_rates() if mixes_evenly else [Fraction(1)] * len(self.datasets)
        self._epochs: dict[int, tuple[list[_Share], Interleaving]] = {}

    def batches_in(self, epoch: int) -> int:
        """Batches of an epoch, steps at which datasets do not take part included."""
        return sum(share.count for share in self._shares(epoch))

    def batches_before(self, epochs: float) -> Fraction:
        """Batches of the first `epochs` epochs, which need not be whole; exact, so that 1.1 of 10 are 11."""
        whole, part = divmod(Fraction(repr(float(epochs))), 1)
        batches = sum(self.batches_in(epoch) for epoch in range(int(whole)))
        return batches + part * (self.batches_in(int(whole)) if part else 0)

    def epochs_at(self, epoch: int, position: int) -> Fraction:
        """Epochs that are done where `position` of `epoch` comes next; exact, since intervals are counted by it."""
        return epoch + Fraction(position, max(self.batches_in(epoch), 1))

    def after(self, epoch: int, position: int) -> tuple[int, int]:
        """The place after the batch at `position` of `epoch`."""
        return (epoch, position + 1) if position + 1 < self.batches_in(epoch) else (epoch + 1, 0)

    def seek(self, epoch: int, position: int, step: int) -> tuple[int, int]:
        """The first place from here on whose dataset takes part in the optimizer step after `step` steps.

        Raises:
            ConfigError: there is none, however many epochs go by.
        """
        schedules = [dataset.schedule for dataset in self.datasets]
        wanted = np.array([schedule.in_step(step) for schedule in schedules], dtype=np.bool_)
        last_start = max((schedule.start_epoch for schedule in schedules), default=0)
        rounds = [rate * Fraction(s.probability) for s, rate in zip(schedules, self._rates, strict=True)]
        rarest = max((math.ceil(1 / each) for each in rounds if each), default=0)
        for number in range(epoch, max(epoch, last_start) + rarest + 1):
            found = self._epoch(number)[1].next_of(position if number == epoch else 0, wanted)
            if found is not None:
                return number, found
        raise ConfigError(_nothing_takes_part(step + 1, epoch + 1))

    def batch(self, epoch: int, position: int, pad_to: int | None = None) -> BatchPlan:
        """The batch at `position` of `epoch`.

        Args:
            pad_to: fill a short batch up to so many samples; the filling carries weight 0.

        Raises:
            IndexError: `position` is not in [0, batches_in(epoch)).
        """
        shares, mix = self._epoch(epoch)
        dataset_index, number = mix.at(position)
        round_number, place = shares[dataset_index].place(number)
        batch = self._orders[dataset_index].batch(round_number, place, pad_to)
        return BatchPlan(
            epoch=epoch,
            position=position,
            dataset_index=dataset_index,
            dataset_id=self.datasets[dataset_index].id,
            size=batch.size,
            sample_indices=batch.sample_indices,
            num_real=batch.num_real,
            round_number=round_number,
        )

    def _epoch(self, epoch: int) -> tuple[list[_Share], Interleaving]:
        known = self._epochs.get(epoch)
        if known is None:
            shares = self._shares(epoch)
            known = shares, Interleaving([share.count for share in shares], self.seed, epoch, "datasets")
            self._epochs = dict([*list(self._epochs.items())[-1:], (epoch, known)])
        return known

    def _shares(self, epoch: int) -> list[_Share]:
        return [self._share(index, epoch) for index in range(len(self.datasets))]

    def _share(self, index: int, epoch: int) -> _Share:
        order = self._orders[index]
        if not order.dataset.schedule.in_epoch(epoch):
            return _Share()
        (first, start), (last, end) = (self._begin(order, self._rates[index], number) for number in (epoch, epoch + 1))
        rounds = range(first, last + 1 if end else last)
        ends = tuple(accumulate(order.batches_in(number) for number in rounds))
        before_last = ends[last - first - 1] if last > first else 0
        return _Share(first, start, before_last + end - start, ends)

    def _even_rates(self) -> list[Fraction]:
        """By what the rounds of each dataset are multiplied so that all give an epoch equally many batches.

        Together they give as many as one round of each, weighted by `probability`; sizes are those of the first round.
        """
        weights = [dataset.schedule.rounds_before(dataset.schedule.start_epoch or 1) for dataset in self.datasets]
        batches = [order.batches_in(0) for order in self._orders]
        total = sum((weight * count for weight, count in zip(weights, batches, strict=True)), Fraction(0))
        mean = total / (sum(weights, Fraction(0)) or 1)
        return [mean / max(count, 1) for count in batches]

    def _begin(self, order: DatasetOrder, rate: Fraction, epoch: int) -> tuple[int, int]:
        """(round, batch in it) with which a dataset begins an epoch."""
        whole, part = divmod(rate * order.dataset.schedule.rounds_before(epoch), 1)
        return int(whole), math.floor(part * order.batches_in(int(whole))) if part else 0


def _nothing_takes_part(step: int, epoch: int) -> Problem:
    return Problem(
        f"at step {step}, from epoch {epoch} on, no dataset takes part",
        key="start_epoch, end_epoch, start_step, end_step, probability",
        fix="make one dataset take part at any time, or end the run earlier (max_train_steps)",
    )


def range_for_rank(length: int, rank: int, world_size: int) -> range:
    """The slots of a global batch that belong to `rank`; the ranks together cover each slot once."""
    return range(length * rank // world_size, length * (rank + 1) // world_size)


def build_sampler(config: TrainConfig, datasets: Sequence[SampledDataset], num_processes: int = 1) -> Sampler:
    """The order of the datasets that are trained on; a batch of it is that of all processes together."""
    return Sampler(
        datasets,
        config.training.train_batch_size * num_processes,
        config.training.seed,
        num_ranks=num_processes,
        fills_batches=bool(config.data.allow_dataset_oversubscription),
        mixes_evenly=config.data.data_backend_sampling == "uniform",
    )
