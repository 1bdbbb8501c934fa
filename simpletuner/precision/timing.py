"""How long ways to compute the same take on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

WARM_UPS, ROUNDS = 3, 5  # first calls may compile and tune


def median_seconds(ways: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    """In turn, so that what slows the device for a while slows all."""
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(WARM_UPS + ROUNDS):
        for way, taken in zip(ways, seconds, strict=True):
            started = _now(device)
            way()
            if turn >= WARM_UPS:
                taken.append(_now(device) - started)
    return [statistics.median(taken) for taken in seconds]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
