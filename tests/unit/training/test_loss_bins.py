"""The loss by noise level, over the samples of all processes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from simpletuner.training.loss_bins import NUM_BINS, LossBins
from simpletuner.training.step import Losses


def test_the_loss_of_a_noise_level_is_that_of_the_samples_of_all_processes() -> None:
    """Here losses of 1 and 3 at a level of 0.05; in the other process 8 there, with half the weight, and 4 at 0.95."""
    assert NUM_BINS == 10
    nothing = [0.0] * 8
    other = [4.0, *nothing, 4.0, 0.5, *nothing, 1.0, 1.0, *nothing, 1.0]  # weighted losses, weights, samples
    group: Any = SimpleNamespace(sum=lambda own: [a + b for a, b in zip(own, other, strict=True)])
    bins = LossBins()
    bins.add(7, [Losses(torch.tensor([1.0, 3.0]), torch.ones(2), torch.full((2,), 0.05))])
    found = bins.take(9, group)
    assert found is not None
    assert (found.step, found.first_step) == (9, 7)
    assert found.bins == ((0.0, 0.1, 8 / 2.5, 3.0), (0.9, 1.0, 4.0, 1.0))
