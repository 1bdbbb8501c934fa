"""`config.json` and `multidatabackend.json` as JSON Schema, so that editors complete keys and check values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from simpletuner.config.datasets import DATASET_CLASSES, KEY_ALIASES, dataset_options
from simpletuner.config.foreign_keys import NEVER_DELETED, RENAMED, RETIRED, UNBUILT
from simpletuner.config.options import OptionInfo, all_options
from simpletuner.config.values import FALSE_WORDS, TRUE_WORDS

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def config_schema() -> dict[str, Any]:
    """The schema of `config.json`: options with and without dashes, old names marked as such."""
    properties = _properties(all_options())
    for old, new in RENAMED.items():
        properties[old] = {"deprecated": True, "description": f"Now called {new}."}
    for old, reason in RETIRED.items():
        properties[old] = {"deprecated": True, "description": f"Has no effect: {reason}."}
    for name, unbuilt in UNBUILT.items():
        properties[name] = {"deprecated": True, "description": f"Refused where it acts: {unbuilt.reason}."}
    return {
        "$schema": DRAFT,
        "title": "simpletuner config.json",
        "type": "object",
        "properties": {"$schema": {"type": "string"}, **properties},
        "patternProperties": {"^--": {}},
        "additionalProperties": False,
    }


def datasets_schema() -> dict[str, Any]:
    """The schema of `multidatabackend.json`: a list whose entries are distinguished by `dataset_type`."""
    return {
        "$schema": DRAFT,
        "title": "simpletuner multidatabackend.json",
        "type": "array",
        "items": {"anyOf": [_dataset_schema(kind) for kind in DATASET_CLASSES]},
    }


def _dataset_schema(kind: str) -> dict[str, Any]:
    infos = dataset_options(kind)
    properties = _properties(infos)
    for key, reason in NEVER_DELETED.items():
        properties[key] = {"deprecated": True, "description": f"Has no effect: {reason}."}
    for alias, name in KEY_ALIASES.items():
        if name in properties:
            properties[alias] = {**properties[name], "deprecated": True}
    return {
        "title": kind,
        "type": "object",
        "properties": properties,
        "required": [name for name, info in infos.items() if info.is_required],
        "additionalProperties": False,
    }


def _properties(infos: Mapping[str, OptionInfo]) -> dict[str, Any]:
    return {name: _property(info) for name, info in infos.items()}


def _property(info: OptionInfo) -> dict[str, Any]:
    """What a file may write for an option; pydantic's own schema knows neither quoted numbers nor what is not built."""
    if info.planned:
        values = [_json(value) for value in (info.default, *info.neutral, None, "")]
        quoted = [json.dumps(value) for value in values if isinstance(value, bool | int | float)]
        allowed = [value for index, value in enumerate([*values, *quoted]) if value not in [*values, *quoted][:index]]
        return {"description": f"{info.help} Not built: {info.planned}.", "deprecated": True, "enum": allowed}
    description = f"{info.help} Unit: {info.unit}." if info.unit else info.help
    default = {} if info.is_required or info.default is None else {"default": _json(info.default)}
    return {"description": description, **default, **_shape(info)}


def _shape(info: OptionInfo) -> dict[str, Any]:
    """The JSON values that a declaration takes; numbers and truth values may stand in quotes."""
    signs = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    if info.type_name == "list":
        return {"type": ["array", "string", "number", "null"]}
    if info.choices:
        return {"enum": [*info.choices, None] if info.default is None else list(info.choices)}
    bounds = {signs[sign]: bound for sign, bound in info.bounds.items()}
    quoted = {"type": "string", "pattern": r"^\s*-?[0-9.]+([eE][+-]?[0-9]+)?\s*$|^$"}
    shapes: dict[str, dict[str, Any]] = {
        "whole number": {"anyOf": [{"type": "number", "multipleOf": 1, **bounds}, quoted, {"type": "null"}]},
        "number": {"anyOf": [{"type": "number", **bounds}, quoted, {"type": "null"}]},
        "true or false": {"enum": [True, False, *TRUE_WORDS, *FALSE_WORDS, "", None]},
        "text": {"type": ["string", "number", "null"]},
        "path": {"type": ["string", "null"]},
        "object": {"type": ["object", "string", "null"]},
        "object, list or path": {"type": ["object", "array", "string", "null"]},
    }
    return shapes[info.type_name]


def _json(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
