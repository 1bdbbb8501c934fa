"""Learning rate schedules as pure functions of the optimizer step: there is no state to save, none to get wrong.

Formulas are those of diffusers' `optimization.py` (constant, linear, cosine, cosine_with_restarts, polynomial), with
one generalization: where diffusers ends at 0, the rate ends at `lr_end`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from simpletuner.config.options import TrainConfig
from simpletuner.errors import ConfigError, Problem

LrFactor = Callable[[int], float]


@dataclass(frozen=True)
class Decay:
    """What shapes a decay.

    Args:
        end: last learning rate as a fraction of the first.
        power: exponent of the polynomial.
        num_cycles: periods over the run.
    """

    end: float
    power: float
    num_cycles: float


def _between(decay: Decay, height: float) -> float:
    """`height` in [0, 1] -> a factor between the end and 1."""
    return decay.end + (1.0 - decay.end) * height


def _constant(progress: float, decay: Decay) -> float:
    return 1.0


def _linear(progress: float, decay: Decay) -> float:
    return _between(decay, 1.0 - progress)


def _cosine(progress: float, decay: Decay) -> float:
    """Half a cosine from 1 to the end."""
    return _between(decay, 0.5 * (1.0 + math.cos(math.pi * progress)))


def _cosine_with_restarts(progress: float, decay: Decay) -> float:
    """`num_cycles` half cosines, each from 1 to the end."""
    if progress >= 1.0:
        return decay.end
    return _between(decay, 0.5 * (1.0 + math.cos(math.pi * ((decay.num_cycles * progress) % 1.0))))


def _polynomial(progress: float, decay: Decay) -> float:
    return _between(decay, (1.0 - progress) ** decay.power)


def _sine(progress: float, decay: Decay) -> float:
    """`num_cycles` arches: from the end up to 1 and down again, half a sine each."""
    return _between(decay, abs(math.sin(math.pi * decay.num_cycles * progress)))


SCHEDULES: dict[str, Callable[[float, Decay], float]] = {
    "constant": _constant,
    "constant_with_warmup": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "sine": _sine,
}


def scaled_learning_rate(config: TrainConfig, num_processes: int) -> float:
    """`learning_rate`, times the images of an optimizer step or their root where `lr_scale` asks for it."""
    if not config.optimizer.lr_scale:
        return config.optimizer.learning_rate
    images = config.training.train_batch_size * config.training.gradient_accumulation_steps * num_processes
    return config.optimizer.learning_rate * (math.sqrt(images) if config.optimizer.lr_scale_sqrt else images)


def build_schedule(
    name: str,
    *,
    learning_rate: float,
    num_training_steps: int,
    num_warmup_steps: int = 0,
    lr_end: float = 4e-7,
    lr_power: float = 0.8,
    lr_num_cycles: float = 1,
) -> LrFactor:
    """`lr_factor(step)`: what the learning rate is multiplied with in optimizer step `step`.

    Args:
        name: one of `SCHEDULES`; every one of them warms up where `num_warmup_steps` is above 0.
        learning_rate: the highest rate.
        num_training_steps: optimizer steps of the run; the end is reached there and kept.
        num_warmup_steps: over these the factor rises linearly from 0.
        lr_end: lowest rate of the decaying schedules and of sine.
        lr_power: of polynomial.
        lr_num_cycles: of cosine_with_restarts and sine.

    Returns:
        A function of the number of optimizer steps done before this one, 0-based as in diffusers.

    Raises:
        ConfigError: no such schedule, or lr_end above the learning rate.
    """
    if name not in SCHEDULES:
        raise ConfigError(
            Problem(f'"{name}" is not a learning rate schedule', key="lr_scheduler", allowed=", ".join(SCHEDULES))
        )
    shape = SCHEDULES[name]
    if shape is not _constant and lr_end > learning_rate:
        raise ConfigError(
            Problem(
                f"{lr_end} is above learning_rate {learning_rate}, so {name} would rise instead of fall",
                key="lr_end",
                allowed=f"0 to {learning_rate}",
            )
        )
    decay = Decay(end=lr_end / learning_rate if learning_rate else 0.0, power=lr_power, num_cycles=lr_num_cycles)
    num_decay_steps = max(1, num_training_steps - num_warmup_steps)

    def lr_factor(step: int) -> float:
        if step < num_warmup_steps:
            return step / num_warmup_steps
        return shape(min(1.0, (step - num_warmup_steps) / num_decay_steps), decay)

    return lr_factor
