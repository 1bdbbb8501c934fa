"""The model families that exist, by name. One line per family; importing this imports no torch."""

from __future__ import annotations

import difflib
import importlib
from typing import Any

from simpletuner.errors import ConfigError, Problem
from simpletuner.models.spec import FamilySpec

FAMILIES: dict[str, str] = {
    "flux": "simpletuner.models.flux.spec:FLUX",
    "sdxl": "simpletuner.models.sdxl.spec:SDXL",
    "omnigen": "simpletuner.models.omnigen.spec:OMNIGEN",
}


def family_names() -> list[str]:
    return sorted(FAMILIES)


def get_spec(name: str) -> FamilySpec:
    """The facts of a family.

    Raises:
        ConfigError: unknown name; suggests the nearest and lists all.
    """
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f'did you mean "{near[0]}"?' if near else None
        raise ConfigError(
            Problem(
                f'"{name}" is not a known model family', key="model_family", allowed=", ".join(family_names()), fix=hint
            )
        )
    return load_dotted(FAMILIES[name])


def get_family_class(spec: FamilySpec) -> Any:
    """The `ModelFamily` subclass of a spec; imports torch and the family's code."""
    return load_dotted(spec.family_class)


def load_dotted(path: str) -> Any:
    """The object at `package.module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
