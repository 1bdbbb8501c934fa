"""An optimizer's state as named tensors and plain values, for safetensors and JSON: no pickle, bit for bit.

torch's own `load_state_dict` numbers the parameters and casts states to the dtype of the weights; here both names and
dtypes are kept. What optimizers keep is tensors, numbers, lists of those, and torchao's tensors of 8 or 4 bit, which
are tensors inside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from simpletuner.distributed.placement import STATE_SEPARATOR as SEPARATOR
from simpletuner.errors import DataError, Problem, shape_text

# How a plain value says that a tensor stands in its place.
TENSOR, PACKED = "tensor:", "packed"

# What optimizers keep in a group on their own account, or decide there at their first step; all else there is settings,
# which come from the configuration.
GROUP_STATE = ("step", "k", "d", "d_max", "d_numerator", "d_denom", "d_hat", "weight_sum", "lr_max", "setup", "triton")
# States with a value for each weight.
LIKE_THE_WEIGHT = ("exp_avg", "exp_avg_sq", "momentum_buffer", "z", "kahan_comp")
# torchao's tensors; a file may name no other class.
PACKED_CLASSES = ("OptimState8bit", "OptimState4bit", "OptimStateFp8")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What must be saved of an optimizer.

    Args:
        names: the trained parameters by name.

    Returns:
        `{"<parameter>//<state>": tensor}`, and a JSON-able dict: the class, states that are no tensors by themselves,
        and what the optimizer itself keeps in its groups.
    """
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for name, parameter in names.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            path = f"{name}{SEPARATOR}{key}"
            if isinstance(value, Tensor) and not _is_packed(value):
                tensors[path] = value.detach()
            else:
                plain.setdefault(name, {})[key] = _to_plain(value, path, tensors)
    groups = [
        {key: _to_plain(group[key], f"{SEPARATOR}{index}{SEPARATOR}{key}", tensors) for key in _own_keys(group)}
        for index, group in enumerate(optimizer.param_groups)
    ]
    summary = {
        "class": type(optimizer).__name__,
        "states": plain,
        "groups": groups,
        "on_host": _on_host(optimizer),
        "strides": {key: list(tensor.stride()) for key, tensor in tensors.items() if not tensor.is_contiguous()},
    }
    json.dumps(summary)  # a state that is neither tensor nor plain value must fail here, not at the next resume
    return _unshared(tensors), summary


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
    strides = plain.get("strides", {})  # earlier versions wrote none
    tensors = {key: _laid_out(tensor, strides.get(key)) for key, tensor in tensors.items()}
    states: dict[str, dict[str, Any]] = {}
    inner = {value.removeprefix(TENSOR) for value in _strings(plain)}
    for key, tensor in tensors.items():
        if key not in inner:
            name, _, state_key = key.partition(SEPARATOR)
            states.setdefault(name, {})[state_key] = tensor
    if problems := _misfits(states, names) + _misfits(plain["states"], names):
        raise DataError(problems)
    for name, values in plain["states"].items():
        states.setdefault(name, {}).update(values)
    optimizer.state.clear()
    on_host = frozenset(plain.get("on_host", ()))

    def placed(values: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
        host = torch.device("cpu")
        return {key: _from_plain(value, tensors, host if key in on_host else device) for key, value in values.items()}

    for name, values in states.items():
        _put(optimizer, names[name], placed(values, names[name].device))
    for group, saved in zip(optimizer.param_groups, plain["groups"], strict=True):
        group.update(placed(saved, _device_of(group)))


def group_numbers(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Counters that an optimizer keeps in its groups, for whoever saves the other states by other means."""
    return [
        {key: group[key] for key in _own_keys(group) if isinstance(group[key], int | float)}
        for group in optimizer.param_groups
    ]


def load_group_numbers(optimizer: torch.optim.Optimizer, plain: Mapping[str, Any]) -> None:
    """Put back what `group_numbers` gave."""
    for group, saved in zip(optimizer.param_groups, plain["groups"], strict=True):
        group.update(saved)


def _laid_out(tensor: Tensor, strides: list[int] | None) -> Tensor:
    """The tensor with the strides that it was saved with. A file holds rows; a matrix that lies in columns, as a QR
    decomposition gives it (SOAP), is multiplied by another kernel, whose last bits differ on some CPUs."""
    if strides is None:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _put(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, state: dict[str, Any]) -> None:
    """Make `state` that of a parameter; bitsandbytes makes its own memory for what it pages, which is then filled."""
    optimizer.state[parameter] = state
    if not getattr(optimizer, "is_paged", False):
        return
    for key, value in state.items():
        if key in ("state1", "state2"):
            make = optimizer.get_state_buffer if value.shape == parameter.shape else optimizer._get_state_double_buffer  # type: ignore[attr-defined]
            state[key] = make(parameter, dtype=value.dtype).copy_(value)


def _on_host(optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of counters that an optimizer keeps in main memory while its weights are on an accelerator: on the other
    side it would wait for them at each step, or round its factors otherwise."""
    found = set()
    for group in optimizer.param_groups:
        if _device_of(group).type == "cpu":
            continue
        holders = [group, *(optimizer.state.get(parameter, {}) for parameter in group["params"])]
        for holder in holders:
            found |= {
                key
                for key, value in holder.items()
                if isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu" and key != "lr"
            }
    return sorted(found)


def _own_keys(group: Mapping[str, Any]) -> list[str]:
    return [key for key in GROUP_STATE if key in group]


def _device_of(group: Mapping[str, Any]) -> torch.device:
    return group["params"][0].device


def _is_packed(value: Any) -> bool:
    return type(value).__name__ in PACKED_CLASSES


def _to_plain(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON for a value; the tensors in it go to `tensors` under names that begin with `path`."""
    if _is_packed(value):
        attributes, context = value.__tensor_flatten__()
        parts = {name: _to_plain(getattr(value, name), f"{path}{SEPARATOR}{name}", tensors) for name in attributes}
        return {PACKED: type(value).__name__, "parts": parts, "context": [_context_to_plain(item) for item in context]}
    if isinstance(value, Tensor):
        tensors[path] = value.detach()
        return f"{TENSOR}{path}"
    if isinstance(value, list | tuple):
        return [_to_plain(item, f"{path}{SEPARATOR}{index}", tensors) for index, item in enumerate(value)]
    return value


def _from_plain(value: Any, tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """The value that `_to_plain` was given; tensors are copies on `device`."""
    if isinstance(value, Tensor):
        return value.detach().to(device, copy=True)
    if isinstance(value, str) and value.startswith(TENSOR):
        return tensors[value.removeprefix(TENSOR)].detach().to(device, copy=True)
    if isinstance(value, list):
        return [_from_plain(item, tensors, device) for item in value]
    if isinstance(value, dict) and PACKED in value:
        parts = {name: _from_plain(part, tensors, device) for name, part in value["parts"].items()}
        return _packed_class(value[PACKED]).__tensor_unflatten__(parts, [_context(item) for item in value["context"]])
    return value


def _packed_class(name: str) -> Any:
    from torchao.optim import subclass_4bit, subclass_8bit, subclass_fp8

    modules = {"OptimState8bit": subclass_8bit, "OptimState4bit": subclass_4bit, "OptimStateFp8": subclass_fp8}
    if name not in modules:
        raise DataError(Problem(f"{name} is not a kind of optimizer state that this version knows"))
    return getattr(modules[name], name)


def _context_to_plain(item: Any) -> Any:
    if isinstance(item, torch.dtype):
        return str(item)
    return list(item) if isinstance(item, tuple) else item


def _context(item: Any) -> Any:
    if isinstance(item, str) and item.startswith("torch."):
        return getattr(torch, item.removeprefix("torch."))
    return torch.Size(item) if isinstance(item, list) else item


def _strings(value: Any) -> list[str]:
    """Every text that stands for a tensor, at any depth."""
    if isinstance(value, str):
        return [value] if value.startswith(TENSOR) else []
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return [text for item in inside for text in _strings(item)]


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies in place of tensors that share memory with another (tables of codes), which a file cannot hold."""
    seen: set[int] = set()
    for key, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.numel() and pointer in seen:
            tensors[key] = tensor.clone()
        seen.add(pointer)
    return {key: tensor.contiguous() for key, tensor in tensors.items()}


def _misfits(states: Mapping[str, Mapping[str, Any]], names: Mapping[str, nn.Parameter]) -> list[Problem]:
    problems = [
        Problem(f"the optimizer state of {name} belongs to no trained parameter")
        for name in states.keys() - names.keys()
        if name
    ]
    for name in states.keys() & names.keys():
        shape = names[name].shape
        for key, value in states[name].items():
            if isinstance(value, Tensor) and key in LIKE_THE_WEIGHT and value.shape != shape:
                problems.append(
                    Problem(
                        f"the optimizer state {key} of {name} is {shape_text(value.shape)}, not {shape_text(shape)}"
                    )
                )
    return problems
