"""Configurations for one model on one card, by name: `flux-dev-12gb`. What acts on memory was computed from shapes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simpletuner.families.presets import Preset, presets_of
from simpletuner.families.registry import FAMILIES, get_spec
from simpletuner.families.spec import FamilySpec, Flavour

_HEAD = """// A LoRA of {title} ({hub_id}) on a card of {card} GB.
// Training takes {gib} GiB of it{ram}: computed from shapes, as `simpletuner plan` does, not measured.
// Put images with a text file beside each into datasets/images, or change multidatabackend.json.
"""


def presets() -> Iterator[tuple[str, FamilySpec, Flavour, int, Preset]]:
    """Name, family, flavor, GB of the card, options."""
    for family in FAMILIES:
        spec = get_spec(family)
        for flavour in spec.flavours.values():
            for card, preset in presets_of(family, flavour.name).items():
                if preset is not None:
                    yield f"{family}-{flavour.name}-{card}gb", spec, flavour, card, preset


def preset_lines() -> list[str]:
    """A line for each flavor: its names in short, and what the smallest card does."""
    cards: dict[str, list[int]] = {}
    smallest: dict[str, Preset] = {}
    for name, _, _, card, preset in presets():
        stem = name.rpartition("-")[0]
        cards.setdefault(stem, []).append(card)
        smallest.setdefault(stem, preset)
    return [f"{stem}-{{{','.join(map(str, found))}}}gb  ({smallest[stem].text()})" for stem, found in cards.items()]


def write_preset(name: str, folder: Path) -> bool:
    """Write `config.json` and `multidatabackend.json` of a preset into a folder; False where there is none so named."""
    for known, spec, flavour, card, preset in presets():
        if known == name:
            ram = f", and {preset.ram_gib} GiB of main memory" if preset.ram_gib else ""
            head = _HEAD.format(title=spec.title, hub_id=flavour.hub_id, card=card, gib=preset.gib, ram=ram)
            config = json.dumps(config_of(name, spec, flavour, preset), indent=4)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(head + config + "\n", encoding="utf-8")
            entries = [{"id": "images", "instance_data_dir": "datasets/images", "caption_strategy": "textfile"}]
            (folder / "multidatabackend.json").write_text(json.dumps(entries, indent=4) + "\n", encoding="utf-8")
            return True
    return False


def config_of(name: str, spec: FamilySpec, flavour: Flavour, preset: Preset) -> dict[str, Any]:
    """The whole configuration."""
    side = preset.options["resolution"]
    return {
        "model_family": spec.name,
        "model_flavour": flavour.name,
        "model_type": "lora",
        "lora_type": "standard",
        "lora_rank": 16,
        "data_backend_config": "multidatabackend.json",
        "output_dir": f"output/{name}",
        "max_train_steps": 2000,
        "train_batch_size": 1,
        "optimizer": "adamw_bf16",
        "learning_rate": 1e-4,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 100,
        "caption_dropout_probability": 0.05,
        "mixed_precision": "bf16",
        **preset.options,
        "resolution_type": "pixel_area",
        "vae_batch_size": 1,
        "validation_prompt": "a photograph of a cat on a windowsill",
        "validation_resolution": f"{side}x{side}",
        "validation_step_interval": 250,
        "checkpoint_step_interval": 250,
        "checkpoints_total_limit": 3,
    }
