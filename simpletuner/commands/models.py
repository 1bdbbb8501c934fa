"""`simpletuner models`: which families and flavours there are, what they need, and what each supports.

Everything comes from the specs, so it is told without torch and without a model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from simpletuner.commands.text import columns, short_count
from simpletuner.errors import bytes_text
from simpletuner.models.registry import all_specs, get_spec
from simpletuner.models.spec import FamilySpec, Flavour

Say = Callable[[str], None]

PREDICTIONS = {"flow": "a velocity (flow matching)", "epsilon": "the noise (epsilon)", "v_prediction": "v"}


def show_models(name: str | None, as_json: bool, say: Say, warn: Say) -> None:
    """Tell all families in short, or one in full.

    Args:
        name: of a family; None tells all.
        as_json: the same facts for programs.
        warn: told of packages whose families cannot be loaded, where one of ours is asked for or all are.

    Raises:
        ConfigError: no such family, or its package cannot be loaded.
    """
    specs, failures = ([get_spec(name)], []) if name else all_specs()
    for line in failures:
        warn(line)
    if as_json:
        say(json.dumps([as_dict(spec) for spec in specs], indent=2))
        return
    for spec in specs:
        for line in detail_lines(spec) if name else short_lines(spec):
            say(line)
    if not name:
        say("`simpletuner models NAME` tells what a family supports.")


def short_lines(spec: FamilySpec) -> list[str]:
    """Title, and a row for each flavour."""
    rows = [(flavour.name, flavour.hub_id, _size(flavour), flavour.licence) for flavour in spec.flavours.values()]
    return [f"{spec.name}: {spec.title}", *columns(rows), ""]


def detail_lines(spec: FamilySpec) -> list[str]:
    lines = [f"{spec.name}: {spec.title}", "flavours (model_flavour)"]
    for flavour in spec.flavours.values():
        default = ", the default" if flavour.name == spec.default_flavour else ""
        lines.append(f"  {flavour.name}{default}: {flavour.hub_id}")
        lines.append(f"    {'; '.join(part for part in (flavour.description, flavour.licence) if part)}")
        if flavour.parameters:
            sizes = ", ".join(f"{bytes_text(flavour.weight_bytes(bits))} in {bits} bits" for bits in (16, 8, 4))
            lines.append(f"    denoiser: {short_count(flavour.parameters)} parameters; frozen weights {sizes}")
    lines.append("the model")
    return lines + columns(list(facts(spec).items()))


def facts(spec: FamilySpec) -> dict[str, str]:
    """What a family supports, by the words that people look for."""
    encoders = [part.name for part in spec.components if part.role == "text_encoder"]
    cached = "captions are cached, then the encoders are freed" if spec.caches_prompt_embeds else "nothing is cached"
    largest = f", up to {spec.max_size} px" if spec.max_size else ""
    references = f"up to {spec.max_references} input pictures" if spec.max_references else "none"
    return {
        "predicts": PREDICTIONS[spec.prediction_type],
        "sides": f"multiples of {spec.size_multiple} px{largest}",
        "latents": f"of {spec.latent_channels} channels, 1/{spec.vae_factor} of the side",
        "prompts": f"up to {spec.max_prompt_tokens} tokens",
        "text": f"{', '.join(encoders) or 'no text encoder'}: {cached}",
        "editing": references,
        "training": "LoRA, DoRA, LyCORIS, all weights",
        "lora_target": ", ".join(("default", "all-linear", *spec.target_groups)),
        "LyCORIS classes": ", ".join([part.class_name for part in spec.adaptable] + sorted(spec.class_aliases)),
        "options": ", ".join(spec.pipeline_options) or "those of all families",
        "previews": spec.preview_decoder or "no tiny decoder is known",
        "drawn by": spec.pipeline_class,
    }


def as_dict(spec: FamilySpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "title": spec.title,
        "flavours": [dataclasses.asdict(flavour) for flavour in spec.flavours.values()],
        "default_flavour": spec.default_flavour,
        **facts(spec),
    }


def _size(flavour: Flavour) -> str:
    return f"{bytes_text(flavour.weight_bytes())} in bf16" if flavour.parameters else "size unknown"
