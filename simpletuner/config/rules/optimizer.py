"""Rules of optimizer, learning rate and schedule: what each optimizer takes and asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from simpletuner.config.checking import show_value
from simpletuner.config.draft import Draft
from simpletuner.config.optimizers import OPTIMIZERS, OptimizerRow
from simpletuner.errors import Problem
from simpletuner.spelling import did_you_mean

# Arguments that have an option of their own.
OWN_OPTIONS = {"lr": "learning_rate"}
# An optimizer that finds the rate itself multiplies what it found by `learning_rate`.
LOWEST_FOUND_RATE = 0.1
# As of `adam_epsilon` and `adam_weight_decay`.
LIMITS = {"eps": 1.0, "weight_decay": 1000.0}


def row_of(draft: Draft) -> OptimizerRow | None:
    """None where the name was refused."""
    return OPTIMIZERS.get(draft.config.optimizer.optimizer)


def optimizer_config_has_arguments_of_the_optimizer(draft: Draft) -> Iterator[Problem]:
    row, name = row_of(draft), draft.config.optimizer.optimizer
    for key, value in (draft.config.optimizer.optimizer_config or {}).items() if row else ():
        if key in OWN_OPTIONS:
            message = f"{key} has an option of its own"
            yield draft.problem(message, "optimizer_config", fix=f"use {OWN_OPTIONS[key]}")
        elif row and key not in row.arguments:
            fix = did_you_mean(key, row.arguments)
            yield draft.problem(f"{name} takes no {key}", "optimizer_config", ", ".join(sorted(row.arguments)), fix)
        elif row and not _is_like(value, row.arguments[key]):
            message = f"{show_value(value)} cannot be {key} of {name}"
            yield draft.problem(message, "optimizer_config", f"a value like {show_value(row.arguments[key])}")
        elif row and _is_epsilon(key) and (bad := _not_above_zero(value)) is not None:
            message = f"{key} is {bad:g}: a weight whose gradient was always 0 would be divided by 0"
            fix = f"leave {key} out: its own is {show_value(row.arguments[key])}"
            yield draft.problem(message, "optimizer_config", "above 0", fix)
        elif key in LIMITS and isinstance(value, int | float) and not 0 <= value <= LIMITS[key]:
            message = f"{show_value(value)} cannot be {key} of {name}: it would train nothing, or destroy the weights"
            yield draft.problem(message, "optimizer_config", f"0 to {LIMITS[key]:g}")


def _is_epsilon(key: str) -> bool:
    """Whether an argument is what keeps a denominator above zero."""
    return key.rstrip("0123456789").removeprefix("adamw_") in ("eps", "epsilon")


def _not_above_zero(value: Any) -> float | None:
    """The first number in a value that is 0 or less."""
    values = value if isinstance(value, list | tuple) else [value]
    return next((each for each in values if isinstance(each, int | float) and each <= 0), None)


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of the default; a default of None says nothing."""
    if default is None:
        return True
    if isinstance(default, bool):
        return isinstance(value, bool)
    if isinstance(default, tuple):
        return isinstance(value, list | tuple) and len(value) == len(default)
    if isinstance(default, int | float):
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, type(default))


def a_found_rate_is_not_set_too(draft: Draft) -> Iterator[Problem]:
    row, rate = row_of(draft), draft.config.optimizer.learning_rate
    if row and row.tunes_lr and rate < LOWEST_FOUND_RATE:
        message = f"{rate:g} would multiply the rate that {draft.config.optimizer.optimizer} finds itself"
        yield draft.problem(
            message, "learning_rate", f"{LOWEST_FOUND_RATE:g} to 10, usually 1", "set learning_rate to 1"
        )


def averaged_weights_are_averaged_once(draft: Draft) -> Iterator[Problem]:
    row, config = row_of(draft), draft.config
    if not row or not row.averages:
        return
    if config.training.use_ema:
        message = f"{config.optimizer.optimizer} averages the weights itself"
        yield draft.problem(message, "use_ema", "false", fix="set use_ema to false, or choose another optimizer")
    if config.optimizer.lr_scheduler not in ("constant", "constant_with_warmup"):
        message = f"{config.optimizer.optimizer} takes the place of a falling learning rate"
        yield draft.problem(message, "lr_scheduler", "constant, constant_with_warmup")


def parts_of_weights_can_be_moved(draft: Draft) -> Iterator[Problem]:
    row, config = row_of(draft), draft.config
    if row and config.processes.fsdp_enable and config.model.model_type == "full" and not row.elementwise:
        name = config.optimizer.optimizer
        message = f"{name} looks at whole weights, and with fsdp_enable each process holds a part of each"
        allowed = ", ".join(name for name, other in OPTIMIZERS.items() if other.elementwise)
        yield draft.problem(message, "optimizer", allowed, fix="use adamw_bf16")


def the_root_of_the_scale_has_a_scale(draft: Draft) -> Iterator[Problem]:
    if draft.config.optimizer.lr_scale_sqrt and not draft.config.optimizer.lr_scale:
        message = "has no effect without lr_scale"
        yield draft.problem(message, "lr_scale_sqrt", fix="set lr_scale to true too, or remove the key")


def exactly_one_length_is_set(draft: Draft) -> Iterator[Problem]:
    steps, epochs = draft.config.training.max_train_steps, draft.config.training.num_train_epochs
    if steps > 0 and epochs > 0:
        message = f"{steps} steps and {epochs:g} epochs (num_train_epochs) are both set"
        yield draft.problem(message, "max_train_steps", fix="set one of them to 0")
    if steps == 0 and epochs == 0:
        allowed = "exactly one of max_train_steps and num_train_epochs above 0"
        yield draft.problem("the run has no length", "max_train_steps", allowed, fix="set max_train_steps")


def a_falling_schedule_falls(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    falls = config.optimizer.lr_scheduler not in ("constant", "constant_with_warmup")
    if falls and config.optimizer.lr_end > config.optimizer.learning_rate and not config.optimizer.lr_scale:
        message = f"{config.optimizer.lr_end:g} is not below learning_rate, which is {config.optimizer.learning_rate:g}"
        fix = f"set lr_end below it, or lr_scheduler to constant instead of {config.optimizer.lr_scheduler}"
        yield draft.problem(message, "lr_end", f"less than {config.optimizer.learning_rate:g}", fix)


OPTIMIZER_RULES = (
    exactly_one_length_is_set,
    a_falling_schedule_falls,
    optimizer_config_has_arguments_of_the_optimizer,
    a_found_rate_is_not_set_too,
    averaged_weights_are_averaged_once,
    parts_of_weights_can_be_moved,
    the_root_of_the_scale_has_a_scale,
)


def terms_that_the_optimizer_lacks(draft: Draft) -> Iterator[str]:
    """Harmless where an optimizer is only tried out, so it is reported and no error."""
    row, name = row_of(draft), draft.config.optimizer.optimizer
    if row is None:
        return
    has = {
        "adam_beta1": bool(row.betas) or row.matrix_only,
        "adam_beta2": bool(row.betas) or row.matrix_only,
        "adam_epsilon": row.has_epsilon or row.matrix_only,
        "adam_weight_decay": row.has_weight_decay,
    }
    for key, is_there in has.items():
        if not is_there and draft.config.value(key) is not None:
            yield f"{draft.origin(key)}: {key}: {name} has no such term; it is not used"


def warm_up_is_shorter_than_the_run(draft: Draft) -> Iterator[str]:
    steps, options = draft.config.training.max_train_steps, draft.config.optimizer
    if 0 < steps <= options.lr_warmup_steps:
        yield (
            f"{draft.origin('lr_warmup_steps')}: lr_warmup_steps: {options.lr_warmup_steps} steps of warm-up in a "
            f"run of {steps}: the learning rate never reaches {options.learning_rate:g}"
        )


OPTIMIZER_NOTICES = (
    warm_up_is_shorter_than_the_run,
    terms_that_the_optimizer_lacks,
)
