"""Where a run goes on, and where it ends, after a resume with other settings.

`num_train_epochs` counts passes over the data. With another batch size, accumulation, dataset or number of processes
an epoch has another number of steps, so the end is counted from where the run stands: steps taken, and what remains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from simpletuner.config.options.training import TrainingOptions
from simpletuner.data.sampler import Sampler
from simpletuner.training.progress import Progress


def length_facts(state: Progress, sampler: Sampler, total_steps: int) -> dict[str, int]:
    """What a checkpoint keeps beside its state, so that another length of epochs is noticed."""
    return {"epoch_batches": sampler.batches_in(state.epoch), "total_steps": total_steps}


def resumed_progress(saved: Mapping[str, Any], sampler: Sampler) -> Progress:
    """The saved place; the same share of the epoch is done where the epoch now has another number of batches."""
    state = Progress.at(saved["state"])
    now = sampler.batches_in(state.epoch)
    before = saved.get("length", {}).get("epoch_batches", now)
    if before == now:
        return state if state.position < now or not state.position else replace(state, position=now)
    return replace(state, position=state.position * now // max(before, 1))


@dataclass(frozen=True)
class Length:
    """Where a run ends.

    Args:
        total_steps: optimizer steps.
        notice: what changed since the checkpoint, None where nothing did.
    """

    total_steps: int
    notice: str | None = None


def total_train_steps(options: TrainingOptions, sampler: Sampler, state: Progress | None = None) -> int:
    """Optimizer steps at which the run ends: `max_train_steps`, or those taken and those of the epochs that remain.

    Args:
        state: where the run stands; None at its beginning.
    """
    state = state or Progress()
    if options.max_train_steps:
        return options.max_train_steps
    done = sampler.batches_before(state.epoch) + state.position if state.global_step else Fraction(0)
    remaining = max(sampler.batches_before(options.num_train_epochs) - done, Fraction(0))
    return max(state.global_step + math.ceil(remaining / options.gradient_accumulation_steps), 1)


def resumed_length(options: TrainingOptions, sampler: Sampler, saved: Mapping[str, Any], state: Progress) -> Length:
    """Where a resumed run ends, and one line where that is not where it would have ended before."""
    total = total_train_steps(options, sampler, state)
    before = saved.get("length", {}).get("total_steps", total)
    if before == total:
        return Length(total)
    text = f"the run now ends at step {total}, not {before}: {state.global_step} steps are done"
    if options.max_train_steps:
        return Length(total, f"{text} (max_train_steps)")
    epochs = sampler.epochs_at(state.epoch, state.position)
    left = max(options.num_train_epochs - float(epochs), 0.0)
    remain = f"{left:.3g} of {options.num_train_epochs:g} epochs remain, {total - state.global_step} steps"
    return Length(total, f"{text}, {remain}")
