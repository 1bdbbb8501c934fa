"""What a LyCORIS configuration asks for in a denoiser, what each entry then adapts, and what could be named instead.

LyCORIS only warns when an entry matches nothing, and says nothing when a module class takes a layer before a name
pattern sees it. Counting what was created, per entry, finds both.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from simpletuner.adapters.base import MatchCount
from simpletuner.adapters.layers import is_adaptable, is_linear, layer_class
from simpletuner.config.lora import ALL_LINEAR, LAYER_CLASSES, fits, lora_patterns
from simpletuner.config.lycoris_algorithms import NORMS
from simpletuner.config.lycoris_presets import with_preset_applied
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import FamilySpec


@dataclass(frozen=True)
class LycorisTargets:
    """Which layers an `apply_preset` block asks for, with class names of the denoiser.

    Args:
        classes: entry as written -> class name in the denoiser.
        names: entries of `target_name` and `name_algo_map`.
        module_algo_map: class name in the denoiser -> settings.
        name_algo_map: pattern -> settings.
        exclude: patterns of module paths that are left alone.
        use_fnmatch: patterns are fnmatch patterns; else regular expressions, matched from the start.
        enable_conv: whether convolutions larger than 1x1 are adapted.
    """

    classes: Mapping[str, str]
    names: tuple[str, ...] = ()
    module_algo_map: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    name_algo_map: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()
    use_fnmatch: bool = False
    enable_conv: bool = True


def resolve_targets(lycoris: Mapping[str, Any], spec: FamilySpec, present_classes: set[str]) -> LycorisTargets:
    """What the configuration asks for in a denoiser that has `present_classes`.

    An alias of the family is used where the denoiser has no class of the name that was written. Without
    `apply_preset`, all linear and convolutional layers are adapted, as LyCORIS does, and with `train_norm` the
    normalizations that it knows.

    Args:
        present_classes: names by `layer_class`, which sees through quantization.
    """
    preset = with_preset_applied(lycoris, spec).get("apply_preset") or {}
    module_map = preset.get("module_algo_map", {})
    written = list(dict.fromkeys([*preset.get("target_module", []), *module_map]))
    names = tuple(dict.fromkeys([*preset.get("target_name", []), *preset.get("name_algo_map", {})]))
    if not written and not names:
        wanted = (*LAYER_CLASSES, *(NORMS if lycoris.get("train_norm") else ()))
        written = [name for name in wanted if name in present_classes]

    def in_denoiser(name: str) -> str:
        return name if name in present_classes else spec.class_aliases.get(name, name)

    return LycorisTargets(
        classes={name: in_denoiser(name) for name in written},
        names=names,
        module_algo_map={in_denoiser(name): settings for name, settings in module_map.items()},
        name_algo_map=dict(preset.get("name_algo_map", {})),
        # Such a pattern means the same as a regular expression.
        exclude=(*preset.get("exclude_name", []), *spec.unadaptable),
        use_fnmatch=bool(preset.get("use_fnmatch", False)),
        enable_conv=bool(preset.get("enable_conv", True)),
    )


def count_matches(denoiser: nn.Module, adapted: Iterable[str], targets: LycorisTargets) -> list[MatchCount]:
    """Adapted layers per entry, in the order of the configuration.

    Args:
        adapted: paths of the adapted layers.
    """
    class_of = {name: layer_class(module) for name, module in denoiser.named_modules()}
    counts: Counter[str] = Counter()
    classes_of_pattern: dict[str, set[str]] = {}
    for path in adapted:
        taken_by = _classes_that_take(path, class_of, targets)
        counts.update(entry for entry, class_name in targets.classes.items() if class_name in taken_by)
        if not taken_by:
            for pattern in _patterns_that_take(path, targets):
                counts[pattern] += 1
                classes_of_pattern.setdefault(pattern, set()).add(class_of[path])
    report = [MatchCount(entry, class_name, counts[entry]) for entry, class_name in targets.classes.items()]
    report += [
        MatchCount(pattern, ", ".join(sorted(classes_of_pattern.get(pattern, ()))), counts[pattern])
        for pattern in targets.names
    ]
    return report


def require_matches(
    report: list[MatchCount], denoiser: nn.Module, targets: LycorisTargets, file: str | None = None
) -> None:
    """Refuse entries that adapt nothing.

    Raises:
        ConfigError: one problem per such entry; lists what could be matched.
    """
    if not report:
        raise ConfigError(Problem("names no layer to adapt", key="apply_preset", file=file))
    problems = []
    for match in report:
        if match.modules:
            continue
        is_class = match.entry in targets.classes
        problems.append(
            Problem(
                f'"{match.entry}" adapts no layer of {type(denoiser).__name__}',
                key="apply_preset." + ("target_module" if is_class else "target_name"),
                file=file,
                allowed=", ".join(adaptable_classes(denoiser) if is_class else adaptable_paths(denoiser)),
                fix="name one of these"
                if is_class
                else "name one of these, without a layer that an entry of target_module already takes",
            )
        )
    if problems:
        raise ConfigError(problems)


def adaptable_classes(denoiser: nn.Module) -> list[str]:
    """Classes of modules that are or contain a linear or convolutional layer, sorted."""
    found = set()
    for name, module in denoiser.named_modules():
        if name and any(is_adaptable(child) for child in module.modules()):
            found.add(layer_class(module))
    return sorted(found)


def adaptable_paths(denoiser: nn.Module) -> list[str]:
    """Paths of the adaptable layers with `*` for numbers, each with how many layers it stands for."""
    counts = Counter(
        ".".join("*" if part.isdigit() else part for part in name.split("."))
        for name, module in denoiser.named_modules()
        if is_adaptable(module)
    )
    return [f"{path} ({count})" for path, count in counts.items()]


def _classes_that_take(path: str, class_of: dict[str, str], targets: LycorisTargets) -> set[str]:
    """Targeted classes among a layer and the modules around it. A module that a name pattern matches is left to it."""
    parts = path.split(".")
    around = [".".join(parts[: end + 1]) for end in range(len(parts))]
    wanted = set(targets.classes.values())
    return {
        class_of[name]
        for name in around
        if class_of[name] in wanted and not any(_matches(pattern, name, targets) for pattern in targets.names)
    }


def _patterns_that_take(path: str, targets: LycorisTargets) -> list[str]:
    """Patterns whose settings apply: of a map only the first that matches, as in LyCORIS, and an exact name first."""
    in_map = [path] if path in targets.name_algo_map else []
    in_map += [pattern for pattern in targets.name_algo_map if _matches(pattern, path, targets)]
    plain = [name for name in targets.names if name not in targets.name_algo_map and _matches(name, path, targets)]
    return in_map[:1] + plain


def _matches(pattern: str, name: str, targets: LycorisTargets) -> bool:
    if pattern == name:
        return True
    if targets.use_fnmatch:
        return fnmatch.fnmatch(name, pattern)
    return re.match(pattern, name) is not None


def lora_layers(denoiser: nn.Module, targets: Sequence[str], spec: FamilySpec) -> tuple[list[str], list[MatchCount]]:
    """The layers that standard LoRA adapts, in the denoiser's order, and how many each entry stands for.

    Args:
        targets: `default`, `all-linear`, names of `spec.target_groups`, fnmatch patterns of module paths, or
            DiffSynth-Studio's names.

    Raises:
        ConfigError: an entry stands for no linear layer.
    """
    layers = {
        path: module
        for path, module in denoiser.named_modules()
        if is_adaptable(module) and not any(fnmatch.fnmatchcase(path, pattern) for pattern in spec.unadaptable)
    }
    report, wanted = [], set()
    for entry in targets:
        patterns = lora_patterns(entry, spec)
        found = [
            path
            for path, module in layers.items()
            if any(fits(path, pattern) for pattern in patterns) and (entry != ALL_LINEAR or is_linear(module))
        ]
        classes = sorted({layer_class(layers[path]) for path in found})
        report.append(MatchCount(entry, ", ".join(classes), len(found)))
        wanted.update(found)
    problems = [
        Problem(
            f'"{match.entry}" adapts no layer of {type(denoiser).__name__}',
            key="lora_target",
            allowed=", ".join(["default", ALL_LINEAR, *spec.target_groups, *adaptable_paths(denoiser)]),
        )
        for match in report
        if not match.modules
    ]
    if problems:
        raise ConfigError(problems)
    return [path for path in layers if path in wanted], report
