"""`lycoris_config.json`, checked without torch: known keys, sound values, and targets that exist in the family.

LyCORIS itself takes any keyword, drops those it does not know, and only logs targets that match nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from simpletuner.config.checking import show_value
from simpletuner.config.json_reader import Document, JsonPath
from simpletuner.config.lycoris_algorithms import (
    ALGO_MAPS,
    ALGORITHMS,
    DEFAULT_ALGORITHM,
    UNUSABLE_ALGORITHMS,
    faults,
)
from simpletuner.config.lycoris_presets import preset_targets, usable_presets
from simpletuner.config.patterns import may_match, sample_paths
from simpletuner.config.values import read_float
from simpletuner.errors import Problem
from simpletuner.families.spec import AdaptableModule, FamilySpec
from simpletuner.spelling import did_you_mean, nearest

# Settings of LyCORIS that this program refuses, and why.
UNUSABLE_KEYS = {
    "train_llm_adapter": "no supported family has such layers",
    "lora_prefix": "files carry the prefix that LyCORIS loads, lycoris",
}

NUMBERS = (
    *("multiplier", "linear_dim", "linear_alpha", "conv_dim", "conv_alpha", "factor", "dropout", "rank_dropout"),
    *("module_dropout", "block_size", "constraint"),
)
SWITCHES = (
    *("use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp", "decompose_both", "full_matrix"),
    *("rescaled", "dora_wd", "wd_on_output", "bypass_mode", "unbalanced_factorization", "use_scalar", "train_norm"),
)
TOP_LEVEL_KEYS = ("algo", "preset", "apply_preset", *NUMBERS, *SWITCHES)
NAME_LISTS = ("target_module", "target_name", "exclude_name")
PRESET_KEYS = (*NAME_LISTS, *ALGO_MAPS, "enable_conv", "use_fnmatch")
# Inside an algo map LyCORIS hands the keys to the module's constructor, which calls some things by other names.
ENTRY_NUMBERS = ("dim", "alpha", "factor", "block_size", "constraint")
ENTRY_SWITCHES = (
    *("use_tucker", "decompose_both", "full_matrix", "rescaled", "weight_decompose", "wd_on_out"),
    *("unbalanced_factorization", "rs_lora", "rank_dropout_scale", "train_on_input", "use_scalar"),
)
ENTRY_KEYS = ("algo", *ENTRY_NUMBERS, *ENTRY_SWITCHES)
ENTRY_NAMES_FOR = {
    "linear_dim": "dim",
    "linear_alpha": "alpha",
    "dora_wd": "weight_decompose",
    "wd_on_output": "wd_on_out",
}


def check_lycoris(document: Document, spec: FamilySpec) -> list[Problem]:
    """Everything that is wrong with a `lycoris_config.json`."""
    lycoris = document.value
    if not isinstance(lycoris, dict):
        return [Problem("is not a JSON object", file=document.file, line=1, allowed='{"algo": "lokr", ...}')]
    problems = [*_unknown_keys(document, (), lycoris, TOP_LEVEL_KEYS), *_bad_algorithm(document, ("algo",), lycoris)]
    problems += _bad_scalars(document, (), lycoris)
    preset = lycoris.get("apply_preset", {})
    if not isinstance(preset, dict):
        return [*problems, _problem(document, ("apply_preset",), "is not a JSON object")]
    problems += _unknown_keys(document, ("apply_preset",), preset, PRESET_KEYS)
    for key in NAME_LISTS:
        if not _is_name_list(preset.get(key, [])):
            message = f"{show_value(preset[key])} is not a list of names"
            problems.append(_problem(document, ("apply_preset", key), message, allowed='["Attention", ...]'))
    for key in ALGO_MAPS:
        problems += _bad_algo_map(document, ("apply_preset", key), preset.get(key, {}))
    if problems:
        return problems
    classes = {each.class_name for each in spec.adaptable}
    found = faults(lycoris, classes, spec.title)
    problems = [*_bad_preset(document, lycoris, spec)]
    problems += [_problem(document, at, message, fix=fix) for at, message, fix in found]
    return problems or check_targets(document, spec.adaptable, spec.class_aliases)


def check_targets(
    document: Document, adaptable: Sequence[AdaptableModule], aliases: Mapping[str, str]
) -> list[Problem]:
    """Entries of `apply_preset` that match nothing in the family; lists what could be matched."""
    preset = document.value.get("apply_preset", {})
    use_fnmatch = preset.get("use_fnmatch", False) is True
    classes = {module.class_name for module in adaptable} | set(aliases)
    names = list(dict.fromkeys(name for module in adaptable for name in module.names))
    problems = []
    for key in ("target_module", "module_algo_map"):
        for place, name in _entries(preset, key):
            if name in classes:
                continue
            near = nearest(name, classes)
            problems.append(
                _problem(
                    document,
                    ("apply_preset", key, place),
                    f'"{name}" matches nothing that an adapter can be attached to',
                    allowed=", ".join(sorted(classes)),
                    fix=f'did you mean "{near}"?' if near else "use a class of this list, or target_name with paths",
                )
            )
    for key in ("target_name", "name_algo_map", "exclude_name"):
        for place, pattern in _entries(preset, key):
            at: JsonPath = ("apply_preset", key, place)
            problems += _pattern_problems(document, at, pattern, use_fnmatch, names)
    return problems


def _entries(preset: Mapping[str, Any], key: str) -> list[tuple[str | int, str]]:
    """(place in the JSON, name) of each entry of a list or map."""
    entries = preset.get(key, [])
    return list(enumerate(entries)) if isinstance(entries, list) else [(name, name) for name in entries]


def _pattern_problems(
    document: Document,
    at: JsonPath,
    pattern: str,
    use_fnmatch: bool,
    names: Sequence[str],
) -> list[Problem]:
    # A path that is written out is one under both rules.
    matches = (use_fnmatch or "*" not in pattern) and may_match(pattern, names)
    if not use_fnmatch and not matches:
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            fix = 'correct it, or set "use_fnmatch": true for patterns with * and ?'
            return [_problem(document, at, f'"{pattern}" is not a regular expression: {error}', fix=fix)]
        matches = any(compiled.match(path) for name in names for path in sample_paths(name))
    # Leaving out what is not there is harmless; attaching to it is not.
    if matches or "exclude_name" in at:
        return []
    return [_problem(document, at, f'"{pattern}" matches no module', allowed=", ".join(names))]


def _bad_preset(document: Document, lycoris: Mapping[str, Any], spec: FamilySpec) -> list[Problem]:
    name = lycoris.get("preset")
    if name is None:
        return []
    if "apply_preset" in lycoris:
        message = "preset and apply_preset both say which layers"
        return [_problem(document, ("preset",), message, fix="remove one of them")]
    try:
        preset_targets(str(name), spec)
    except ValueError as error:
        usable = usable_presets(spec)
        fix = did_you_mean(str(name), usable) or "write apply_preset"
        message = f'"{name}" cannot be used with {spec.title}: {error}'
        return [_problem(document, ("preset",), message, ", ".join(usable), fix)]
    return []


def _problem(
    document: Document, at: JsonPath, message: str, allowed: str | None = None, fix: str | None = None
) -> Problem:
    key = ".".join(str(part) for part in at)
    return Problem(message, key=key, file=document.file, line=document.line(*at), allowed=allowed, fix=fix)


def _unknown_keys(document: Document, at: JsonPath, settings: Mapping[str, Any], known: Sequence[str]) -> list[Problem]:
    problems = []
    for key in settings:
        if key in known:
            continue
        if key in UNUSABLE_KEYS:
            problems.append(_problem(document, (*at, key), f"cannot be used: {UNUSABLE_KEYS[key]}"))
            continue
        near = (ENTRY_NAMES_FOR.get(key) if known is ENTRY_KEYS else None) or nearest(key, known)
        fix = f'did you mean "{near}"?' if near else "remove it"
        message = "there is no setting of this name here"
        problems.append(_problem(document, (*at, key), message, allowed=", ".join(sorted(known)), fix=fix))
    return problems


def _bad_algorithm(document: Document, at: JsonPath, settings: Mapping[str, Any]) -> list[Problem]:
    algo = settings.get("algo", DEFAULT_ALGORITHM)
    if algo in ALGORITHMS:
        return []
    reason = UNUSABLE_ALGORITHMS.get(str(algo))
    message = f"{show_value(algo)} cannot be trained: {reason}" if reason else f"{show_value(algo)} is not an algorithm"
    fix = None if reason else did_you_mean(str(algo), ALGORITHMS)
    return [_problem(document, at, message, allowed=", ".join(ALGORITHMS), fix=fix)]


def _bad_scalars(document: Document, at: JsonPath, settings: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for key, value in settings.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if key in (*NUMBERS, *ENTRY_NUMBERS) and not is_number:
            problems.append(_problem(document, (*at, key), f"{show_value(value)} is not a number"))
        elif is_number and (fault := _number_fault(key, value)):
            problems.append(_problem(document, (*at, key), f"{show_value(value)} {fault}"))
        elif key in (*SWITCHES, *ENTRY_SWITCHES) and not isinstance(value, bool):
            problems.append(_problem(document, (*at, key), f"{show_value(value)} is not true or false"))
        elif key in ("linear_dim", "dim") and value < 1:
            problems.append(_problem(document, (*at, key), f"{value} adapts no layer", allowed="at least 1"))
    return problems


def _number_fault(key: str, value: float) -> str | None:
    try:
        read_float(value)
    except ValueError as error:
        return str(error)
    if key.endswith("dropout") and not 0 <= value < 1:
        return "must be at least 0 and below 1"
    return None


def _is_name_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) and item for item in value)


def _bad_algo_map(document: Document, at: JsonPath, value: Any) -> list[Problem]:
    if not isinstance(value, dict):
        return [_problem(document, at, "is not a JSON object", allowed='{"Attention": {"factor": 16}}')]
    problems = []
    for entry, settings in value.items():
        if not isinstance(settings, dict):
            problems.append(_problem(document, (*at, entry), "is not a JSON object", allowed='{"factor": 16}'))
            continue
        problems += _unknown_keys(document, (*at, entry), settings, ENTRY_KEYS)
        problems += _bad_algorithm(document, (*at, entry, "algo"), settings)
        problems += _bad_scalars(document, (*at, entry), settings)
    return problems
