"""Events with plain values, for tests that are about some of them."""

from __future__ import annotations

from typing import Any

from simpletuner.reporting.events import StepDone

_PLAIN_STEP: dict[str, Any] = {
    "total_steps": 10,
    "loss": 0.5,
    "learning_rate": 1e-4,
    "grad_norm": None,
    "seconds": 0.1,
    "samples": 4,
    "epoch": 1,
}


def step_done(step: int, **values: Any) -> StepDone:
    """Optimizer step `step` of 10, and what a test says otherwise of it."""
    return StepDone(step=step, **_PLAIN_STEP | values)
