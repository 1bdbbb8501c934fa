"""How an option is declared: `name: type = option(default, help=...)`, and what is known of each declared option.

The one declaration drives the checks, the command line, the reference pages and the JSON Schema.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

Level = Literal["basic", "advanced"]
PathKind = Literal["input", "output"]

REQUIRED: Any = ...


class OptionGroup(BaseModel):
    """Base of the groups of `TrainConfig`; a group is what one page of the reference shows."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)


def option(
    default: Any,
    *,
    help: str,
    takes: str | None = None,
    unit: str | None = None,
    level: Level = "advanced",
    since: str = "0.1",
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    planned: str | None = None,
    neutral: tuple[Any, ...] = (),
    planned_values: Mapping[str, str] | None = None,
    path: PathKind | None = None,
    empty_is_value: bool = False,
) -> Any:
    """Declare one option.

    Args:
        default: value where nobody sets it; `REQUIRED` where somebody must.
        help: one or two sentences: what it does, what it interacts with.
        takes: what is accepted, for users, where the name of the type is not enough.
        unit: of the number.
        planned: why it cannot be used yet; then only `default` and the `neutral` values are accepted.
        neutral: values of a planned option that change nothing.
        planned_values: single values that are known and cannot be used yet, with the reason.
        path: `input` must exist and is looked up; `output` is made in the working folder.
        empty_is_value: an empty text is a value of its own, not "unset".
    """
    facts: dict[str, Any] = {
        "takes": takes,
        "unit": unit,
        "level": level,
        "since": since,
        "planned": planned,
        "neutral": list(neutral),
        "planned_values": dict(planned_values or {}),
        "path": path,
        "empty_is_value": empty_is_value,
    }
    return Field(default, description=help, ge=ge, gt=gt, le=le, lt=lt, json_schema_extra={"x-option": facts})


@dataclass(frozen=True)
class OptionInfo:
    """What the declaration of one option says. `choices` leaves out the planned values."""

    name: str
    annotation: Any
    default: Any
    help: str
    group: str
    takes: str | None
    unit: str | None
    level: Level
    since: str
    planned: str | None
    neutral: tuple[Any, ...]
    planned_values: Mapping[str, str]
    path: PathKind | None
    empty_is_value: bool
    bounds: Mapping[str, float] = field(default_factory=dict)
    choices: tuple[str, ...] = ()

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED

    @property
    def is_secret(self) -> bool:
        """Whether its value may never be shown."""
        return annotation_holds(self.annotation, SecretStr)

    @property
    def allowed(self) -> str:
        """What would be accepted, as a text for users."""
        if self.takes:
            return self.takes
        if self.choices:
            return ", ".join(self.choices)
        signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
        limits = " and ".join(f"{signs[sign]} {bound:.10g}" for sign, bound in self.bounds.items())
        return f"{self.type_name} {limits}".strip()

    @property
    def type_name(self) -> str:
        """The type, named for users: whole number, number, true or false, text, path, ..."""
        return type_words(self.annotation)


def type_words(annotation: Any) -> str:
    """A type, named for users."""
    names = {
        bool: "true or false",
        int: "whole number",
        float: "number",
        dict: "object",
        str: "text",
        SecretStr: "text",
    }
    if annotation in names:
        return names[annotation]
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_words(arguments[0])
    if origin in (typing.Union, types.UnionType):
        if {SecretStr, Path} <= set(arguments):  # `values.SecretJsonOrPath`
            return "object, list or path"
        return " or ".join(dict.fromkeys(type_words(part) for part in arguments if part is not type(None)))
    if origin is Literal:
        return "choice"
    if origin in (tuple, list):
        return "list"
    if origin is dict:
        return "object"
    return "path" if getattr(annotation, "__name__", "") == "Path" else "object"


def annotation_holds(annotation: Any, kind: type) -> bool:
    """Whether `kind` is somewhere inside a type."""
    return annotation is kind or any(annotation_holds(part, kind) for part in typing.get_args(annotation))


def literal_values(annotation: Any) -> tuple[str, ...]:
    """The values of the `Literal` somewhere inside a type, or ()."""
    if typing.get_origin(annotation) is Literal:
        return typing.get_args(annotation)
    for part in typing.get_args(annotation):
        if values := literal_values(part):
            return values
    return ()


def describe_field(name: str, field_info: FieldInfo, group: str) -> OptionInfo:
    """Read a declaration back from pydantic's field."""
    extra = field_info.json_schema_extra
    facts: dict[str, Any] = dict(extra["x-option"]) if isinstance(extra, dict) else {}  # type: ignore[arg-type]
    bounds = {
        sign: getattr(item, sign)
        for item in field_info.metadata
        for sign in ("ge", "gt", "le", "lt")
        if hasattr(item, sign)
    }
    default = REQUIRED if field_info.default is PydanticUndefined else field_info.default
    planned_values = facts.pop("planned_values")
    choices = tuple(value for value in literal_values(field_info.annotation) if value not in planned_values)
    return OptionInfo(
        name=name,
        annotation=field_info.annotation,
        default=default,
        help=field_info.description or "",
        group=group,
        planned_values=planned_values,
        neutral=tuple(facts.pop("neutral")),
        bounds=bounds,
        choices=choices,
        **facts,
    )
