"""`lycoris_config.json`: what may stand in it, checked before torch is imported.

LyCORIS takes any keyword and drops those it does not know; here an unknown key is an error that names the nearest one.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simpletuner.errors import Problem
from simpletuner.models.spec import FamilySpec

ALGORITHMS = ("lokr", "loha", "locon", "lora", "glora", "diag-oft", "boft")

# Of LyCORIS' own algorithms, those that this version does not train, and why.
UNUSABLE_ALGORITHMS = {
    "full": "it takes the weights out of the base; model_type full trains everything",
    "dylora": "it draws a random rank at each step, so a saved file cannot be checked against the training output",
    "ia3": "it replaces the layers in a way that cannot be switched off",
    "tlora": "it needs the timestep inside each layer",
}

UNUSABLE_KEYS = {
    "use_scalar": "LyCORIS folds the scalar into the weights of the file, which a resumed run would need apart",
    "train_norm": "only linear and convolutional layers are adapted",
    "train_llm_adapter": "no family here has one",
    "preset": "apply_preset says which layers",
    "lora_prefix": "files carry the prefix that LyCORIS loads, lycoris",
}

NUMBERS = {
    "multiplier", "linear_dim", "linear_alpha", "conv_dim", "conv_alpha", "factor", "dropout", "rank_dropout",
    "module_dropout", "block_size", "constraint",
}  # fmt: skip
SWITCHES = {
    "use_tucker", "use_cp", "use_conv_cp", "disable_conv_cp", "decompose_both", "full_matrix", "rescaled",
    "dora_wd", "wd_on_output", "bypass_mode", "unbalanced_factorization",
}  # fmt: skip
TOP_LEVEL_KEYS = {"algo", "apply_preset"} | NUMBERS | SWITCHES

PRESET_KEYS = {
    "enable_conv", "target_module", "target_name", "module_algo_map", "name_algo_map", "use_fnmatch", "exclude_name",
}  # fmt: skip

# Inside an algo map LyCORIS hands the keys to the module's constructor, which calls some things by other names.
ENTRY_KEYS = {
    "algo", "dim", "alpha", "factor", "use_tucker", "decompose_both", "full_matrix", "block_size",
    "constraint", "rescaled", "weight_decompose", "wd_on_out", "unbalanced_factorization", "rs_lora",
    "rank_dropout_scale", "train_on_input",
}  # fmt: skip
ENTRY_NAMES_FOR = {
    "linear_dim": "dim", "linear_alpha": "alpha", "dora_wd": "weight_decompose", "wd_on_output": "wd_on_out",
}  # fmt: skip

KEY = "lycoris_config"


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
    `apply_preset`, all linear and convolutional layers are adapted, as LyCORIS does.
    """
    preset = lycoris.get("apply_preset") or {}
    module_map = preset.get("module_algo_map", {})
    written = list(dict.fromkeys([*preset.get("target_module", []), *module_map]))
    names = tuple(dict.fromkeys([*preset.get("target_name", []), *preset.get("name_algo_map", {})]))
    if not written and not names:
        written = [name for name in ("Linear", "Conv1d", "Conv2d", "Conv3d") if name in present_classes]

    def in_denoiser(name: str) -> str:
        return name if name in present_classes else spec.class_aliases.get(name, name)

    return LycorisTargets(
        classes={name: in_denoiser(name) for name in written},
        names=names,
        module_algo_map={in_denoiser(name): settings for name, settings in module_map.items()},
        name_algo_map=dict(preset.get("name_algo_map", {})),
        exclude=tuple(preset.get("exclude_name", [])),
        use_fnmatch=bool(preset.get("use_fnmatch", False)),
        enable_conv=bool(preset.get("enable_conv", True)),
    )


def check_lycoris_config(lycoris: Any, spec: FamilySpec, file: str | None = None) -> list[Problem]:
    """Everything that is wrong with a `lycoris_config.json`, found without loading anything.

    Args:
        lycoris: the parsed file.
        spec: the family, for the classes that `target_module` may name.
        file: its path, for the messages.
    """
    if not isinstance(lycoris, Mapping):
        return [Problem("is not a JSON object", key=KEY, file=file, allowed='{"algo": "lokr", ...}')]
    problems = _unknown_keys(lycoris, TOP_LEVEL_KEYS, "", file)
    problems += _bad_algorithm(lycoris.get("algo", "lokr"), "algo", file)
    problems += _bad_numbers(lycoris, file)
    preset = lycoris.get("apply_preset", {})
    if not isinstance(preset, Mapping):
        return [*problems, Problem("is not a JSON object", key="apply_preset", file=file)]
    problems += _unknown_keys(preset, PRESET_KEYS, "apply_preset.", file)
    for key in ("target_module", "target_name", "exclude_name"):
        problems += _bad_list(preset.get(key, []), f"apply_preset.{key}", file)
    for key in ("module_algo_map", "name_algo_map"):
        problems += _bad_map(preset.get(key, {}), f"apply_preset.{key}", file)
    if not problems:
        problems += _unknown_classes(preset, spec, file)
        problems += _bad_patterns(preset, file)
    return problems


def _unknown_keys(values: Mapping[str, Any], known: set[str], place: str, file: str | None) -> list[Problem]:
    problems = []
    for key in values:
        if key in known:
            continue
        if key in UNUSABLE_KEYS:
            problems.append(Problem(f"cannot be used: {UNUSABLE_KEYS[key]}", key=f"{place}{key}", file=file))
            continue
        near = ENTRY_NAMES_FOR.get(key) if known is ENTRY_KEYS else None
        near = near or next(iter(difflib.get_close_matches(key, known, n=1)), None)
        problems.append(
            Problem(
                "is not a key that is known here",
                key=f"{place}{key}",
                file=file,
                allowed=", ".join(sorted(known)),
                fix=f'did you mean "{near}"?' if near else "remove it",
            )
        )
    return problems


def _bad_algorithm(algo: Any, key: str, file: str | None) -> list[Problem]:
    if algo in ALGORITHMS:
        return []
    reason = UNUSABLE_ALGORITHMS.get(algo, "it is unknown") if isinstance(algo, str) else "it is not a name"
    return [Problem(f"{algo!r} cannot be trained: {reason}", key=key, file=file, allowed=", ".join(ALGORITHMS))]


def _bad_numbers(lycoris: Mapping[str, Any], file: str | None) -> list[Problem]:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    problems = [
        Problem(f"{lycoris[key]!r} is not a number", key=key, file=file)
        for key in sorted(NUMBERS & lycoris.keys())
        if not is_number(lycoris[key])
    ]
    problems += [
        Problem(f"{lycoris[key]!r} is not true or false", key=key, file=file, allowed="true, false")
        for key in sorted(SWITCHES & lycoris.keys())
        if not isinstance(lycoris[key], bool)
    ]
    dim = lycoris.get("linear_dim", 4)
    if is_number(dim) and dim < 1:
        problems.append(Problem(f"{dim} adapts no linear layer", key="linear_dim", file=file, allowed="at least 1"))
    return problems


def _bad_list(value: Any, key: str, file: str | None) -> list[Problem]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if is_list and all(isinstance(item, str) for item in value):
        return []
    return [Problem(f"{value!r} is not a list of names", key=key, file=file, allowed='["Attention", ...]')]


def _bad_map(value: Any, key: str, file: str | None) -> list[Problem]:
    if not isinstance(value, Mapping) or not all(isinstance(settings, Mapping) for settings in value.values()):
        return [Problem(f"{value!r} is not a map", key=key, file=file, allowed='{"Attention": {"factor": 16}}')]
    problems = []
    for entry, settings in value.items():
        problems += _unknown_keys(settings, ENTRY_KEYS, f"{key}.{entry}.", file)
        if "algo" in settings:
            problems += _bad_algorithm(settings["algo"], f"{key}.{entry}.algo", file)
    return problems


def _unknown_classes(preset: Mapping[str, Any], spec: FamilySpec, file: str | None) -> list[Problem]:
    known = {module.class_name for module in spec.adaptable} | set(spec.class_aliases)
    entries = [("target_module", name) for name in preset.get("target_module", [])]
    entries += [
        ("module_algo_map", name)
        for name in preset.get("module_algo_map", {})
        if ("target_module", name) not in entries
    ]
    return [
        Problem(
            f'"{name}" matches nothing that an adapter can be attached to in {spec.title}',
            key=f"apply_preset.{key}",
            file=file,
            allowed=", ".join(sorted(known)),
            fix="use one of these classes, or target_name with module paths",
        )
        for key, name in entries
        if name not in known
    ]


def _bad_patterns(preset: Mapping[str, Any], file: str | None) -> list[Problem]:
    if preset.get("use_fnmatch", False):
        return []
    problems = []
    for key in ("target_name", "name_algo_map", "exclude_name"):
        for pattern in preset.get(key, []):
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(
                    Problem(
                        f'"{pattern}" is not a regular expression: {error}',
                        key=f"apply_preset.{key}",
                        file=file,
                        fix='correct it, or set "use_fnmatch": true for patterns with * and ?',
                    )
                )
    return problems
