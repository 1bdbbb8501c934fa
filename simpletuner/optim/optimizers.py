"""Optimizers by the name that the configuration uses. One table row each: what builds it and what it takes."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from simpletuner.errors import ConfigError, MissingDependency, Problem

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class OptimizerEntry:
    """One optimizer.

    Args:
        target: `package.module:Class`, a torch optimizer.
        defaults: constructor arguments that differ from the class's own defaults; the configuration wins over them.
        extra: extra of this package to install where the class lives in an optional package.
        keyed: takes `seed`, for the randomness of its own.
        notes: what a user should know, one line.
    """

    target: str
    notes: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    extra: str | None = None
    keyed: bool = False


_TORCH_ADAMW = OptimizerEntry(
    target="torch.optim:AdamW",
    # One kernel for all weights, on the CPU too; five times as fast as the default for many small ones.
    defaults={"fused": True},
    notes="torch's AdamW; for float32 weights",
)

OPTIMIZERS: Mapping[str, OptimizerEntry] = {
    "adamw_bf16": OptimizerEntry(
        target="simpletuner.optim.adamw_bf16:AdamWBF16",
        keyed=True,
        notes="AdamW with stochastic rounding for bfloat16 weights and states; plain AdamW for float32 weights",
    ),
    "adamw": _TORCH_ADAMW,
    "torch-adamw": _TORCH_ADAMW,
}

# Arguments that have an option of their own, or that the trainer decides.
_OWN_OPTIONS = {"lr": "learning_rate"}
_RESERVED = {"params", "self", "seed", "maximize", "differentiable", "capturable"}


def build_optimizer(
    name: str, parameters: Mapping[str, nn.Parameter], config: Mapping[str, Any], seed: int = 0
) -> torch.optim.Optimizer:
    """The optimizer `name` over `parameters`, in their order, as one group.

    Args:
        parameters: trained parameters by name.
        config: reads learning_rate, adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon and optimizer_config
            ("k=v,k=v" or a map; wins over the others); what is absent or None keeps the optimizer's default.
        seed: of the run, for optimizers that draw random numbers.

    Raises:
        ConfigError: no such optimizer, an argument that it does not take, or a value that it refuses.
    """
    entry = get_entry(name)
    optimizer_class = _load_class(entry, name)
    arguments = _arguments(optimizer_class, entry, name, config)
    if entry.keyed:
        arguments["seed"] = seed
    try:
        return optimizer_class(list(parameters.values()), **arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(Problem(f"{name} refuses its settings: {error}", key="optimizer_config")) from error


def get_entry(name: str) -> OptimizerEntry:
    """The table row of an optimizer; ConfigError that lists all where there is none."""
    if name not in OPTIMIZERS:
        raise ConfigError(
            Problem(f'"{name}" is no optimizer of this version', key="optimizer", allowed=", ".join(sorted(OPTIMIZERS)))
        )
    return OPTIMIZERS[name]


def parse_optimizer_config(text: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """`"weight_decay=0.1,amsgrad=true"` or a map -> keyword arguments.

    Raises:
        ConfigError: a part that is not `key=value`.
    """
    if text is None:
        return {}
    if isinstance(text, Mapping):
        return dict(text)
    values = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, separator, value = part.partition("=")
        if not separator or not key.strip():
            raise ConfigError(
                Problem(f'"{part}" is not key=value', key="optimizer_config", allowed="key=value,key=value, or a map")
            )
        values[key.strip()] = _parse_value(value.strip())
    return values


def _parse_value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _load_class(entry: OptimizerEntry, name: str) -> type[torch.optim.Optimizer]:
    module, _, class_name = entry.target.partition(":")
    try:
        return getattr(importlib.import_module(module), class_name)
    except ImportError as error:
        if entry.extra is None:
            raise
        raise MissingDependency(
            Problem(
                f"{name} needs a package that is not installed: {error}",
                key="optimizer",
                fix=f"pip install 'simpletuner[{entry.extra}]'",
            )
        ) from error


def _arguments(
    optimizer_class: type[torch.optim.Optimizer], entry: OptimizerEntry, name: str, config: Mapping[str, Any]
) -> dict[str, Any]:
    """Constructor arguments: the row's defaults < the options < optimizer_config."""
    accepted = set(inspect.signature(optimizer_class.__init__).parameters) - _RESERVED
    arguments = dict(entry.defaults)
    options = {
        "lr": config.get("learning_rate"),
        "weight_decay": config.get("adam_weight_decay"),
        "eps": config.get("adam_epsilon"),
    }
    arguments |= {key: float(value) for key, value in options.items() if value is not None and key in accepted}
    if "betas" in accepted:
        beta1, beta2 = (config.get(f"adam_beta{index}") for index in (1, 2))
        arguments["betas"] = (0.9 if beta1 is None else float(beta1), 0.999 if beta2 is None else float(beta2))
    given = parse_optimizer_config(config.get("optimizer_config"))
    problems = [_refused(key, name, accepted) for key in given if key not in accepted or key in _OWN_OPTIONS]
    if problems:
        raise ConfigError(problems)
    if "betas" in given:
        given["betas"] = tuple(given["betas"])
    return arguments | given


def _refused(key: str, name: str, accepted: set[str]) -> Problem:
    if key in _OWN_OPTIONS:
        return Problem(f"{key} has an option of its own", key="optimizer_config", fix=f"use {_OWN_OPTIONS[key]}")
    return Problem(
        f"{name} takes no {key}", key="optimizer_config", allowed=", ".join(sorted(accepted - _OWN_OPTIONS.keys()))
    )
