"""What is made of losses: the best step, patience, JSON, and means by noise level; by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from simpletuner.distributed.world import ALONE
from simpletuner.training.evaluation import best_step, evaluations_without_gain, losses_as_json, losses_from_json
from simpletuner.training.loss_bins import LossBins
from simpletuner.training.step import Losses


def test_the_best_step_is_the_earliest_of_the_lowest_and_not_the_untrained_model():
    assert best_step({0: 0.1, 10: 0.5, 20: 0.4, 30: 0.4}) == 20
    assert best_step({0: 0.5, 10: math.nan, 20: 0.6}) == 20
    assert best_step({0: 0.5}) == 0


@pytest.mark.parametrize(
    ("losses", "count"),
    [
        ({}, 0),
        ({0: 0.5}, 0),
        ({0: 0.5, 10: 0.4}, 0),
        ({0: 0.5, 10: 0.5}, 1),
        ({0: 0.5, 10: 0.6, 20: 0.55}, 2),
        ({0: 0.5, 10: 0.6, 20: 0.4, 30: math.nan}, 1),
    ],
)
def test_patience_counts_the_last_evaluations_that_brought_nothing_lower(losses: dict[int, float], count: int):
    assert evaluations_without_gain(losses) == count


def test_losses_survive_json_and_are_cut_at_a_step():
    written = json.loads(json.dumps(losses_as_json({0: 0.5, 10: math.nan, 20: 0.25}), allow_nan=False))
    read = losses_from_json(written, until=10)
    assert list(read) == [0, 10]
    assert read[0] == 0.5
    assert math.isnan(read[10])


def losses(*rows: tuple[float, float, float]) -> Losses:
    sigmas, per_sample, weights = torch.tensor(rows).T
    return Losses(per_sample, weights, sigmas)


def test_losses_are_averaged_by_noise_level_with_their_weights():
    bins = LossBins()
    bins.add(4, [losses((0.05, 1.0, 1.0), (0.95, 4.0, 1.0)), losses((0.09, 3.0, 3.0))])
    bins.add(5, [losses((1.0, 8.0, 1.0), (0.5, math.nan, 1.0), (0.45, 7.0, 0.0))])
    event = bins.take(5, ALONE)
    assert event is not None
    assert (event.step, event.first_step) == (5, 4)
    # 0.0-0.1: (1 * 1 + 3 * 3) / 4; 0.9-1.0: (4 + 8) / 2. What is not finite or only fills up does not count.
    assert [tuple(map(float, row)) for row in event.bins] == [(0.0, 0.1, 2.5, 2.0), (0.9, 1.0, 6.0, 2.0)]
    assert bins.take(6, ALONE) is None
