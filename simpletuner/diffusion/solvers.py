"""Steps from a noisier level to a less noisy one, in the project's one convention and for every kind of family.

A level mixes `signal` parts of data and `noise` parts of noise. A solver knows the model only by its estimate of the
data at each level, so it does not matter what the model predicts or which way it counts time. First-order steps are
DDIM's, which on straight paths are Euler's.

Sources: Lu et al., "DPM-Solver++" (arXiv 2211.01095), algorithm 2, for `dpm`; Zhao et al., "UniPC" (arXiv 2302.04867),
algorithms 5 to 8 with B2(h), for `unipc`, whose predictor of second order is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from simpletuner.diffusion.flow_matching import append_dims

SolverName = Literal["euler", "dpm", "unipc"]
# A level of pure noise has no finite lambda.
_LEAST = 1e-6


@dataclass(frozen=True)
class Level:
    """(B,) float32 amounts of data and of noise."""

    signal: Tensor
    noise: Tensor

    @property
    def lam(self) -> Tensor:
        """(B,) lambda, `log(signal / noise)`, kept finite."""
        return self.signal.clamp_min(_LEAST).log() - self.noise.clamp_min(_LEAST).log()


class Solver:
    """One trajectory of a batch.

    Args:
        order: 1 or 2; `euler` is always of the first.
    """

    def __init__(self, name: SolverName, order: int = 2):
        self.name = name
        self.order = 1 if name == "euler" else order
        # Earlier levels and estimates, the last one last; and where the last step began, and of which order it was.
        self._history: list[tuple[Level, Tensor]] = []
        self._start: Tensor | None = None
        self._last_order = 1

    def step(self, noisy: Tensor, data: Tensor, level: Level, target: Level) -> Tensor:
        """(B, ...) the latents at `target`, a less noisy level.

        Args:
            noisy: (B, ...) the latents at `level`: what the last step returned.
            data: (B, ...) the model's estimate of the data there.
        """
        if self.name == "unipc" and self._start is not None:
            noisy = self._corrected(self._start, data, level)
        self._history = [*self._history[-1:], (level, data)]
        self._last_order = min(self.order, len(self._history))
        self._start = noisy
        moved, amount = _first_order(noisy, data, level, target)
        if self._last_order == 1:
            return moved
        (before, earlier), (_, present) = self._history
        slope = _quotient(target.lam - level.lam, level.lam - before.lam)
        return moved + _like(amount * 0.5 * slope, noisy) * (present - earlier)

    def _corrected(self, start: Tensor, data: Tensor, level: Level) -> Tensor:
        """The last step taken again with the estimate at its end; UniC. Nothing is asked of the model for it."""
        begin, first = self._history[-1]
        moved, amount = _first_order(start, first, begin, level)
        change = data - first
        if self._last_order == 1:
            return moved + _like(0.5 * amount, start) * change
        before, earlier = self._history[-2]
        h = level.lam - begin.lam
        h = torch.where(h == 0, 1.0, h)  # a step that goes nowhere: `amount` is 0
        ratio = (before.lam - begin.lam) / h
        scale = torch.expm1(-h)
        phi_1 = scale / -h - 1
        phi_2 = phi_1 / -h - 0.5
        # Two equations: rho_0 + rho_1 = phi_1 / B, ratio rho_0 + rho_1 = 2 phi_2 / B.
        rho_0 = (phi_1 - 2 * phi_2) / scale / (1 - ratio)
        rho_1 = torch.where(ratio == 0, 0.5, phi_1 / scale - rho_0)
        past = (earlier - first) * _like(_quotient(rho_0, ratio), start)
        return moved + _like(amount, start) * (past + _like(rho_1, start) * change)


def _first_order(noisy: Tensor, data: Tensor, level: Level, target: Level) -> tuple[Tensor, Tensor]:
    """The step that keeps the implied noise, and the (B,) amount by which it moves toward `data`."""
    kept = target.noise / level.noise
    amount = target.signal - level.signal * kept
    return _like(kept, noisy) * noisy + _like(amount, noisy) * data, amount


def _quotient(values: Tensor, by: Tensor) -> Tensor:
    """(B,) 0 where `by` is 0: levels that coincide, near pure noise or between those of a discrete schedule, tell
    nothing of a change from one to the other."""
    return torch.where(by == 0, 0.0, values / torch.where(by == 0, 1.0, by))


def _like(values: Tensor, latents: Tensor) -> Tensor:
    return append_dims(values.to(latents.dtype), latents.ndim)
