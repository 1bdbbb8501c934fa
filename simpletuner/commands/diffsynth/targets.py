"""`--lora_target_modules` as `lora_target`, which knows DiffSynth's names of layers."""

from __future__ import annotations

from simpletuner.config.lora import lora_patterns
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.diffsynth import target_patterns
from simpletuner.families.spec import FamilySpec


def lora_target(names: str, spec: FamilySpec) -> list[str]:
    """The entries that a list of names with commas stands for, each once.

    A name stays as it is, unless `lora_target` takes it for a layer of another name here: FLUX.1's `proj_out`.

    Raises:
        ConfigError: a name ends no layer's path.
    """
    words = [name for each in names.split(",") if (name := each.strip())]
    found = target_patterns(words, spec)
    unknown = [name for name, patterns in found.items() if not patterns]
    if unknown or not words:
        message = f'"{unknown[0] if unknown else ""}" ends no path of a layer of {spec.title} in DiffSynth-Studio'
        fix = "name others, or give lora_target of this program: --lora_target=..."
        raise ConfigError(Problem(message, key="--lora_target_modules", fix=fix))
    entries = [
        entry
        for name, patterns in found.items()
        for entry in ([name] if set(lora_patterns(name, spec)) == set(patterns) else patterns)
    ]
    return list(dict.fromkeys(entries))
