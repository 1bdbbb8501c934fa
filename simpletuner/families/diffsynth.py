"""DiffSynth-Studio's names of layers (`--lora_target_modules`) as patterns of `lora_target`."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable

from simpletuner.families.spec import FamilySpec


def target_patterns(names: Iterable[str], spec: FamilySpec) -> dict[str, tuple[str, ...]]:
    """Name in DiffSynth-Studio -> patterns of the layers here that it stands for; none where it stands for no layer.

    A name is the end of a path, as PEFT takes it: `to_out`, `norm1_a.linear`. `a_to_qkv` is three layers here.
    """
    table = spec.diffsynth
    if table is None:
        return dict.fromkeys(names, ())
    # With the same number for each star, a path of one table fits the patterns of the other.
    layers = [*table.renamed, *(part for parts in table.fused.values() for part in parts)]
    theirs = {layer: table.original(layer.replace("*", "0")).name for layer in layers}
    return {
        name: _as_patterns([layer for layer, path in theirs.items() if f".{path}".endswith(f".{name}")], layers, spec)
        for name in names
    }


def _as_patterns(wanted: list[str], layers: list[str], spec: FamilySpec) -> tuple[str, ...]:
    """Layers as patterns of the family where one stands for wanted layers alone, the others as they are."""
    groups = [spec.default_lora_targets, *spec.target_groups.values()]
    patterns, left = [], dict.fromkeys(wanted)
    for pattern in dict.fromkeys(pattern for group in groups for pattern in group):
        fitting = [layer for layer in layers if fnmatch.fnmatchcase(layer, pattern)]
        if fitting and all(layer in wanted for layer in fitting):
            patterns.append(pattern)
            left = {layer: None for layer in left if layer not in fitting}
    return (*patterns, *left)
