"""`lora_target`, checked without torch: each entry is a group of the family or a pattern that fits its layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from simpletuner.config.patterns import may_match
from simpletuner.families.diffsynth import target_patterns
from simpletuner.families.spec import FamilySpec
from simpletuner.spelling import nearest

DEFAULT = "default"
ALL_LINEAR = "all-linear"
LAYER_CLASSES = ("Linear", "Conv1d", "Conv2d", "Conv3d")


def lora_patterns(entry: str, spec: FamilySpec) -> tuple[str, ...]:
    """The fnmatch patterns of module paths that one entry of `lora_target` stands for."""
    if entry == DEFAULT:
        return tuple(spec.default_lora_targets)
    if entry == ALL_LINEAR:
        return ("*",)
    if entry in spec.target_groups:
        return spec.target_groups[entry]
    return (entry,) if is_known(entry, spec) else target_patterns([entry], spec)[entry] or (entry,)


def fits(path: str, pattern: str) -> bool:
    """Whether a pattern names this layer, or the container that holds nothing but it: diffusers' `to_out`."""
    return fnmatch.fnmatchcase(path, pattern) or (
        path.endswith("to_out.0") and fnmatch.fnmatchcase(path.removesuffix(".0"), pattern)
    )


def is_known(entry: str, spec: FamilySpec) -> bool:
    """Whether a layer of the family may have a path that the entry names, or the container that is `to_out`."""
    names = _layer_names(spec)
    return may_match(entry, [*names, *(name.removesuffix(".0") for name in names if name.endswith("to_out.0"))])


def _layer_names(spec: FamilySpec) -> list[str]:
    return [name for each in spec.adaptable if each.class_name in LAYER_CLASSES for name in each.names]


def unknown_targets(targets: Sequence[str], spec: FamilySpec) -> Iterator[tuple[str, str, str | None]]:
    """(entry, what is allowed, the nearest name) of each entry that stands for no layer of the family."""
    names = [DEFAULT, ALL_LINEAR, *spec.target_groups]
    for entry in targets:
        if entry in names or target_patterns([entry], spec)[entry] or is_known(entry, spec):
            continue
        yield entry, ", ".join([*names, *_layer_names(spec)]), nearest(entry, names)
