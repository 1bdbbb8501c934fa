"""Raw settings -> a typed model, with every fault as a `Problem` that says where, what, and what is allowed.

Pydantic does the checking; this module only words what it found, and refuses what is declared but not built.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from simpletuner.config.layers import Origin, Setting
from simpletuner.config.options import GROUPS, OptionInfo, TrainConfig, all_options, split_by_group
from simpletuner.errors import Problem
from simpletuner.spelling import did_you_mean

Model = TypeVar("Model", bound=BaseModel)

MANY_CHOICES = 20

_BOUND_WORDS = {
    "greater_than_equal": "too small",
    "greater_than": "too small",
    "less_than_equal": "too large",
    "less_than": "too large",
}


def check_settings(
    cls: type[Model],
    infos: Mapping[str, OptionInfo],
    settings: Mapping[str, Setting],
    origin: Origin,
    path: str = "",
) -> tuple[Model | None, list[Problem]]:
    """Make a model from settings whose names are all known.

    Args:
        infos: the declarations of the model's fields.
        origin: where the whole comes from, for what is missing.
        path: what stands before a key in messages (`my-dataset.`).

    Returns:
        the model, with defaults in place of values at fault, or None where a required value is missing or at fault;
        and the problems.
    """
    values = {name: setting.value for name, setting in settings.items()}
    problems = []
    try:
        return cls.model_validate(values), []
    except ValidationError as error:
        faults = {str(fault["loc"][0]): fault for fault in reversed(error.errors(include_url=False))}
    for name, fault in faults.items():
        setting = settings.get(name)
        if setting is None:
            message = "is missing"
            problems.append(origin.problem(message, key=f"{path}{name}", allowed=infos[name].allowed, fix="set it"))
        else:
            problems.append(_fault_problem(infos[name], setting, fault, path))
    sound = {name: value for name, value in values.items() if name not in faults}
    try:
        return cls.model_validate(sound), problems
    except ValidationError:
        return None, problems


def check_options(settings: Mapping[str, Setting], origin: Origin) -> tuple[TrainConfig | None, list[Problem]]:
    """`check_settings` for a whole configuration, whose options stand in groups."""
    groups: dict[str, Any] = {}
    problems: list[Problem] = []
    for name, found in reversed(split_by_group(settings).items()):
        groups[name], faults = check_settings(GROUPS[name], all_options(), found, origin)
        problems += faults
    return (None if None in groups.values() else TrainConfig(**groups)), problems


def _fault_problem(info: OptionInfo, setting: Setting, fault: Mapping[str, Any], path: str) -> Problem:
    kind, shown = fault["type"], "the value" if info.is_secret else show_value(setting.value)
    fix, allowed = None, info.allowed
    if setting.value is True and setting.origin.kind != "file":  # text but for a flag that stands alone
        message, fix = "has no value", f"write --{info.name}=VALUE"
    elif kind in _BOUND_WORDS:
        message = f"{shown} is {_BOUND_WORDS[kind]}"
    elif kind == "literal_error":
        message = f"{shown} is not one of the choices"
        fix = did_you_mean(str(fault["input"]), info.choices)
        allowed = _likely_choices(str(fault["input"]), info)
    elif kind == "value_error":
        message = f"{shown}: {fault['ctx']['error']}"
    else:
        message = f"{shown} is of another kind"
    return setting.origin.problem(message, key=f"{path}{info.name}", allowed=allowed, fix=fix)


def _likely_choices(word: str, info: OptionInfo) -> str:
    """What is allowed; of many choices those that `word` resembles, since fifty names in a row help nobody."""
    if len(info.choices) <= MANY_CHOICES:
        return info.allowed
    near = difflib.get_close_matches(word.lower(), info.choices, n=6, cutoff=0.4)
    return f"{', '.join([*near, '...'])} (`simpletuner options {info.name}` lists all {len(info.choices)})"


def show_value(value: Any) -> str:
    """A value as it stands in a file, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 120 else f"{text[:117]}..."


def refuse_planned(
    values: Mapping[str, Any],
    infos: Mapping[str, OptionInfo],
    place: Callable[[str], Origin],
    path: str = "",
    skip: Collection[str] = (),
) -> list[Problem]:
    """What is declared but not built, and set to something that would have to act.

    Args:
        values: of all options.
        place: option -> where its value comes from.
        skip: options that are answered for elsewhere.
    """
    problems = []
    for name, info in infos.items():
        value = values[name]
        if name in skip:
            continue
        if info.planned and value != info.default and not is_neutral(value, info.neutral):
            neutral = ", ".join(show_value(item) for item in dict.fromkeys((info.default, *info.neutral)))
            message = f"{show_value(value)} cannot be used: {info.planned}"
            problems.append(
                place(name).problem(message, key=f"{path}{name}", allowed=f"only {neutral}", fix="remove the key")
            )
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, str) and item in info.planned_values:
                message = f'"{item}" cannot be used: {info.planned_values[item]}'
                problems.append(place(name).problem(message, key=f"{path}{name}", allowed=info.allowed))
    return problems


def is_neutral(value: Any, neutral: Collection[Any]) -> bool:
    """Whether `value` is one of `neutral`; True is not 1, and 0 is not False."""
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in neutral)
