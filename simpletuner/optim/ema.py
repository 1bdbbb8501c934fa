"""Exponential moving average of the trained weights, in float32 whatever the weights' dtype.

Early weights are far from the final ones, so the decay starts low: `min(decay, (1 + s) / (10 + s))` at step s, as in
TensorFlow's `ExponentialMovingAverage` with `num_updates`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from simpletuner.errors import DataError, Problem
from simpletuner.precision.mixed import forget_casts


class EMA:
    """The average of named parameters.

    Args:
        parameters: trained parameters by name; the average starts as a copy of them.
        decay: highest decay, in [0, 1).
        update_interval: optimizer steps between two updates.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float, update_interval: int = 1):
        self.decay = decay
        self.update_interval = update_interval
        self.averages = {
            name: parameter.detach().to(torch.float32, copy=True) for name, parameter in parameters.items()
        }

    def decay_at(self, step: int) -> float:
        """The decay after `step` optimizer steps."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Move the average toward the live parameters, if it is its turn.

        Args:
            step: optimizer steps done so far, 1 after the first.
        """
        if step % self.update_interval:
            return
        live = [parameters[name].detach().float() for name in self.averages]
        torch._foreach_lerp_(list(self.averages.values()), live, 1.0 - self.decay_at(step))

    @contextmanager
    def swapped_in(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """Inside the context the live parameters hold the average; afterwards their own values, bit for bit."""
        kept = {name: parameters[name].detach().clone() for name in self.averages}
        try:
            self._write(parameters, self.averages)
            yield
        finally:
            self._write(parameters, kept)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, float32, sharing memory."""
        return dict(self.averages)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the averages from a checkpoint, by parameter name; other names are ignored.

        Raises:
            DataError: a parameter has no saved average, or one of another shape.
        """
        missing = [
            name
            for name, average in self.averages.items()
            if name not in tensors or tensors[name].shape != average.shape
        ]
        if missing:
            raise DataError(
                Problem(
                    f"the checkpoint has no average for {len(missing)} parameters: {', '.join(missing[:3])}",
                    key="use_ema",
                    fix="resume with the use_ema and the adapter that the run had",
                )
            )
        for name, average in self.averages.items():
            average.copy_(tensors[name])

    @staticmethod
    @torch.no_grad()
    def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            parameters[name].copy_(value)
        forget_casts()
