"""From the name of an optimizer to the optimizer; `config/optimizers.py` holds what is known of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simpletuner.config.optimizers import OPTIMIZERS, OptimizerRow
from simpletuner.config.rules.optimizer import OWN_OPTIONS
from simpletuner.config.trained_parts import LOW_RATE, rates_of
from simpletuner.errors import ConfigError, MissingDependency, Problem
from simpletuner.hardware import missing_compiler
from simpletuner.importing import collector_off, import_class
from simpletuner.precision.mixed import forget_casts

if TYPE_CHECKING:
    from torch import nn

    from simpletuner.config.options.optimizer import OptimizerOptions

# Key of a parameter group: what the learning rate is multiplied by.
RATE = "rate"
# Large enough for optimizers that keep the state of small weights in full precision.
TRIED_SHAPE = (128, 64)


def build_optimizer(
    options: OptimizerOptions, parameters: Mapping[str, nn.Parameter], seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer of a configuration over `parameters`, in their order.

    Args:
        options: `optimizer_config` wins over the others; what is None keeps the optimizer's own default.
        parameters: trained parameters by name.
        seed: of the run, for optimizers that draw random numbers.

    Raises:
        ConfigError: no such optimizer, an argument that it does not take, or a value that it refuses.
        MissingDependency: it compiles its step, and there is nothing to compile with.
    """
    name = options.optimizer
    row = get_row(name)
    arguments = _arguments(row, options) | ({"seed": seed} if row.has_seed else {})
    if row.compiles:
        _require_compiler(name, next(iter(parameters.values())).device)
    optimizer_class = import_class(row.target)
    groups: Any = _matrices_apart(parameters) if row.matrix_only else _by_rate(parameters, options)
    try:
        optimizer = optimizer_class(groups, **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(Problem(f"{name} refuses its settings: {error}", key="optimizer_config")) from error
    if row.averages:
        optimizer.train()
    return optimizer


def require_optimizer(options: OptimizerOptions, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Take one step with the optimizer on a small weight, before anything is loaded for it.

    Args:
        dtype: of the weights that it will train.

    Raises:
        ConfigError: what `build_optimizer` raises, or the step fails: state in float8 needs a card that computes it.
    """
    weight = torch.nn.Parameter(torch.zeros(TRIED_SHAPE, device=device, dtype=dtype))
    with collector_off():  # torch imports its compiler for an optimizer's first group
        optimizer = build_optimizer(options, {"weight": weight})
    weight.grad = torch.ones_like(weight)
    # Compiling a step takes a CPU longer than many a run; on a GPU the compiled kernel is what may fail.
    stance = "default" if device.type == "cuda" else "force_eager"
    try:
        with torch.compiler.set_stance(stance):
            optimizer.step()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        message = f"{options.optimizer} cannot take a step on {device}: {reason}"
        fix = "use adamw_bf16 or adamw, which need nothing but torch"
        raise ConfigError(Problem(message, key="optimizer", fix=fix)) from error


def get_row(name: str) -> OptimizerRow:
    """The table row of an optimizer; ConfigError that lists all where there is none."""
    if name not in OPTIMIZERS:
        raise ConfigError(
            Problem(
                f'"{name}" is not an optimizer of this version', key="optimizer", allowed=", ".join(sorted(OPTIMIZERS))
            )
        )
    return OPTIMIZERS[name]


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of the next step; torchao keeps it in a tensor, so that its compiled step is not compiled again."""
    for group in optimizer.param_groups:
        rate = learning_rate * group.get(RATE, 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def keeps_averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights that it trains are not those that it is there to find."""
    return "train_mode" in optimizer.param_groups[0]


@contextmanager
def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside the context the weights are the averaged ones, if the optimizer keeps some; afterwards the trained ones,
    bit for bit, which going there and back by schedulefree's own formulas would not give."""
    if not keeps_averages(optimizer):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    kept = [parameter.detach().clone() for parameter in parameters]
    optimizer.eval()  # type: ignore[attr-defined]
    forget_casts()
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
        for group in optimizer.param_groups:
            group["train_mode"] = True
        forget_casts()


def _arguments(row: OptimizerRow, options: OptimizerOptions) -> dict[str, Any]:
    """Constructor arguments: the row's defaults < the options < optimizer_config."""
    inner = "adamw_" if row.matrix_only else ""  # the options are those of the AdamW inside
    arguments = {**row.defaults, "lr": options.learning_rate}
    if options.adam_weight_decay is not None and row.has_weight_decay:
        arguments["weight_decay"] = options.adam_weight_decay
    if options.adam_epsilon is not None and (row.has_epsilon or inner):
        arguments[f"{inner}eps"] = options.adam_epsilon
    if betas := row.betas or row.arguments.get("adamw_betas", ()):
        chosen = [options.adam_beta1, options.adam_beta2]
        wanted = [own if beta is None else beta for beta, own in zip(chosen, betas, strict=False)]
        arguments[f"{inner}betas"] = (*wanted, *betas[2:])
    if row.matrix_only:
        arguments |= {"adamw_lr": arguments["lr"], "adamw_wd": arguments["weight_decay"]}
    given = options.optimizer_config or {}
    if problems := [_refused(key, options.optimizer, row) for key in given if key not in row.arguments]:
        raise ConfigError(problems)
    for key, value in given.items():
        arguments[key] = tuple(value) if isinstance(row.arguments[key], tuple) else value
    return arguments


def _refused(key: str, name: str, row: OptimizerRow) -> Problem:
    if key in OWN_OPTIONS:
        return Problem(f"{key} has an option of its own", key="optimizer_config", fix=f"use {OWN_OPTIONS[key]}")
    return Problem(f"{name} takes no {key}", key="optimizer_config", allowed=", ".join(sorted(row.arguments)))


def _by_rate(parameters: Mapping[str, nn.Parameter], options: OptimizerOptions) -> list[Any]:
    """The parameters; in two groups where some of them train at a lower rate."""
    if not options.trainable_modules_low_learning_rate:
        return list(parameters.values())
    rates = rates_of(parameters, options.trainable_modules, options.trainable_modules_low_learning_rate)
    groups = [
        {"params": [parameters[name] for name in parameters if rates.get(name, 1.0) == rate], RATE: rate}
        for rate in (1.0, LOW_RATE)
    ]
    return [group for group in groups if group["params"]]


def _matrices_apart(parameters: Mapping[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Two groups: matrices between features, and the rest: vectors, and tables that are looked up row by row."""
    is_matrix = {name: parameter.ndim >= 2 and "embed" not in name for name, parameter in parameters.items()}
    groups = [
        {"params": [parameters[name] for name, found in is_matrix.items() if found is wanted], "use_muon": wanted}
        for wanted in (True, False)
    ]
    return [group for group in groups if group["params"]]


def _require_compiler(name: str, device: torch.device) -> None:
    if what := missing_compiler(device.type):
        message = f"{name} compiles its step, which needs {what}"
        raise MissingDependency(Problem(message, key="optimizer", fix=f"install {what}, or use bnb-adamw8bit"))
