"""From settings as written to one setting per option: old names, retired names, misspelled names, layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from simpletuner.config.checking import show_value
from simpletuner.config.foreign_keys import INVERTED, RENAMED, RETIRED, UNBUILT, VALUE_ALIASES
from simpletuner.config.layers import Layer, Setting
from simpletuner.config.options import all_options
from simpletuner.config.values import read_bool
from simpletuner.errors import Problem
from simpletuner.spelling import nearest


@dataclass
class Merged:
    """The setting that counts for each option, and what was wrong with the names on the way."""

    settings: dict[str, Setting] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def option_names() -> list[str]:
    """Every name that is understood: options, their old names, retired names, names that are refused with a reason."""
    return [*all_options(), *RENAMED, *RETIRED, *UNBUILT]


def merge_layers(layers: Iterable[Layer]) -> Merged:
    """Apply layers in order; a later layer wins over an earlier one, key by key."""
    merged = Merged()
    unbuilt: dict[str, Setting] = {}
    for layer in layers:
        merged.warnings += layer.warnings
        written: dict[str, str] = {}
        for setting in layer.settings:
            if setting.key in UNBUILT:
                unbuilt[setting.key] = setting
                continue
            known = _known(setting, merged)
            if known is None:
                continue
            first = written.setdefault(known.key, setting.key)
            if first != setting.key:
                message = f'is given twice, as "{first}" and as "{setting.key}"'
                merged.problems.append(setting.origin.problem(message, key=known.key, fix=f'keep "{known.key}"'))
                continue
            if _is_unset(known):
                continue
            merged.settings[known.key] = known
    for setting in unbuilt.values():
        _refuse_unbuilt(setting, merged)
    return merged


def _refuse_unbuilt(setting: Setting, merged: Merged) -> None:
    """Report a key of another trainer that would change the result; one that is off, or cannot act, is no problem."""
    key, origin = UNBUILT[setting.key], setting.origin
    if key.accepts(setting.value):
        return
    if key.where is not None:
        option, start = key.where
        chosen = merged.settings.get(option)
        if chosen is None or not str(chosen.value).startswith(start):
            merged.warnings.append(f"{origin}: {setting.key} has no effect: {option} is not {start}")
            return
    message = f"{show_value(setting.value)} cannot be used: {key.reason}"
    allowed = f"only {', '.join(key.neutral)}" if key.neutral else None
    merged.problems.append(origin.problem(message, setting.key, allowed, key.fix or "remove the key"))


def _known(setting: Setting, merged: Merged) -> Setting | None:
    """The setting under its present name and value, or None where there is nothing to set."""
    key, origin = setting.key, setting.origin
    if key in RETIRED:
        merged.warnings.append(f"{origin}: {key} has no effect: {RETIRED[key]}")
        return None
    if key in RENAMED:
        merged.warnings.append(f"{origin}: {key} is now called {RENAMED[key]}")
        setting = replace(setting, key=RENAMED[key])
        if key in INVERTED:
            try:
                setting = replace(setting, value=not read_bool(setting.value))
            except ValueError:
                merged.problems.append(origin.problem(f"{show_value(setting.value)} must be true or false", key=key))
                return None
    if setting.key not in all_options():
        merged.problems.append(unknown_key(setting, option_names()))
        return None
    alias = VALUE_ALIASES.get((setting.key, str(setting.value)))
    if alias:
        merged.warnings.append(f'{origin}: {key}: "{setting.value}" is now called "{alias}"')
        setting = replace(setting, value=alias)
    return setting


def _is_unset(setting: Setting) -> bool:
    """null, and an empty text unless that is a value of its own, leave the default in place."""
    return setting.value is None or (setting.value == "" and not all_options()[setting.key].empty_is_value)


def unknown_key(
    setting: Setting, known: Iterable[str], path: str = "", aliases: Mapping[str, str] = RENAMED
) -> Problem:
    """The problem of a key that nothing is called; suggests the nearest.

    Args:
        path: what stands before the key in messages (`my-dataset.`).
        aliases: old name -> present name; an old name that is near suggests the present one.
    """
    near = nearest(setting.key, known)
    near = aliases.get(near, near) if near else None
    fix = f'did you mean "{near}"?' if near else "`simpletuner options --search WORD` finds options by what they do"
    return setting.origin.problem("there is no option of this name", key=f"{path}{setting.key}", fix=fix)
