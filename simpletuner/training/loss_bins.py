"""The training loss by noise level: the loss of one step is mostly the luck of its few sigmas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from simpletuner.distributed.process_group import ProcessGroup
from simpletuner.reporting.events import LossBySigma
from simpletuner.training.step import Losses

NUM_BINS = 10
INTERVAL = 100  # optimizer steps


class LossBins:
    """Gathers losses and, every `INTERVAL` steps, gives their means by sigma.

    The tensors stay on their device until then, so that no step waits for it. What was gathered is not part of a
    checkpoint: the first event after a resume covers fewer steps, and says so.
    """

    def __init__(self) -> None:
        self._first_step = 0
        self._gathered: list[Tensor] = []

    def add(self, step: int, losses: Sequence[Losses]) -> None:
        """Take the micro-batches of optimizer step `step`, counted from 1."""
        if not self._gathered:
            self._first_step = step
        for micro in losses:
            self._gathered.append(torch.stack([micro.sigmas.float(), micro.per_sample.detach().float(), micro.weights]))

    def take(self, step: int, process_group: ProcessGroup) -> LossBySigma | None:
        """The means of what was gathered in all processes, which is then forgotten; None where nothing was."""
        sums, weights, counts = self._sums() if self._gathered else [[0.0] * NUM_BINS] * 3
        totals = process_group.sum([*sums, *weights, *counts])
        first_step, self._gathered = self._first_step, []
        bins = [
            (index / NUM_BINS, (index + 1) / NUM_BINS, loss / weight, count)
            for index, (loss, weight, count) in enumerate(
                zip(totals[:NUM_BINS], totals[NUM_BINS : 2 * NUM_BINS], totals[2 * NUM_BINS :], strict=True)
            )
            if weight > 0
        ]
        return LossBySigma(step, first_step, tuple(bins)) if bins else None

    def _sums(self) -> list[list[float]]:
        """By bin: the sum of weighted losses, of weights, and of samples."""
        sigmas, losses, weights = torch.cat([each.cpu().double() for each in self._gathered], dim=1)
        is_finite = losses.isfinite() & (weights > 0)
        sigmas, losses, weights = sigmas[is_finite], losses[is_finite], weights[is_finite]
        places = (sigmas * NUM_BINS).long().clamp(0, NUM_BINS - 1)
        by_bin = [
            torch.zeros(NUM_BINS, dtype=torch.float64).index_add(0, places, values).tolist()
            for values in (losses * weights, weights, torch.ones_like(weights))
        ]
        return by_bin
