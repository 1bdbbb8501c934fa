"""An optimizer's state as named tensors and plain values, for safetensors and JSON: no pickle, bit for bit.

torch's own `load_state_dict` numbers the parameters and casts states to the dtype of the weights; here both names and
dtypes are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.distributed.placement import STATE_SEPARATOR as SEPARATOR
from simpletuner.errors import DataError, Problem


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What must be saved of an optimizer.

    Args:
        names: the trained parameters by name.

    Returns:
        `{"<parameter>//<state>": tensor}`, and a JSON-able dict: the class, states that are plain values, and what the
        optimizer itself keeps in its groups. Settings (learning rate, betas) are not state: they come from the
        configuration.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, parameter in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}{SEPARATOR}{key}"] = value.detach()
            else:
                plain.setdefault(name, {})[key] = value
    groups = [_group_state(optimizer, group) for group in optimizer.param_groups]
    summary = {"class": type(optimizer).__name__, "states": plain, "groups": groups}
    json.dumps(summary)  # a state that is neither tensor nor plain value must fail here, not at the next resume
    return tensors, summary


def load_optimizer_tensors(
    optimizer: torch.optim.Optimizer,
    names: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    plain: Mapping[str, Any],
) -> None:
    """Put a saved state back; the optimizer keeps its settings.

    Raises:
        DataError: the state belongs to another optimizer or to other parameters.
    """
    if plain["class"] != type(optimizer).__name__:
        raise DataError(
            Problem(
                f"the checkpoint holds the state of {plain['class']}, the configuration asks for "
                f"{type(optimizer).__name__}",
                key="optimizer",
                fix="resume with the optimizer of the run, or start a new run from its weights",
            )
        )
    states: dict[str, dict[str, Any]] = {name: dict(values) for name, values in plain["states"].items()}
    for key, tensor in tensors.items():
        name, _, state_key = key.partition(SEPARATOR)
        states.setdefault(name, {})[state_key] = tensor
    if problems := _misfits(states, names):
        raise DataError(problems)
    optimizer.state.clear()
    for name, values in states.items():
        device = names[name].device
        optimizer.state[names[name]] = {
            key: value.detach().to(device, copy=True) if isinstance(value, Tensor) else value
            for key, value in values.items()
        }
    for group, saved in zip(optimizer.param_groups, plain["groups"], strict=True):
        group.update(saved)


def _group_state(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps per group on its own account (schedule-free: weight sums), without its settings."""
    return {key: value for key, value in group.items() if key != "params" and key not in optimizer.defaults}


def _misfits(states: Mapping[str, Mapping[str, Any]], names: Mapping[str, nn.Parameter]) -> list[Problem]:
    problems = [
        Problem(f"the optimizer state of {name} belongs to no trained parameter") for name in states.keys() - names
    ]
    for name in states.keys() & names.keys():
        shape = names[name].shape
        for key, value in states[name].items():
            # A state is a number per parameter or a value per weight.
            if isinstance(value, Tensor) and value.ndim and value.shape != shape:
                problems.append(
                    Problem(f"the optimizer state {key} of {name} has shape {tuple(value.shape)}, not {tuple(shape)}")
                )
    return problems
