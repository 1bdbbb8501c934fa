"""How each model trains on a card of a given size: options computed from its shapes by `scripts/presets.py`."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.hardware import GIB

PRESETS_FILE = Path(__file__).with_name("presets.json")
CARDS = (8, 12, 16, 24, 80)  # GB
# Of the memory that a card is sold with: what the driver, CUDA's context and gaps between tensors leave.
_SHARE, _CONTEXT = 0.94, 0.6 * GIB


@dataclass(frozen=True)
class Preset:
    """Options of `config.json` with which a LoRA of a model trains on a card.

    Args:
        options: name -> value.
        gib: that training takes of the card, as `simpletuner plan` counts.
        ram_gib: of main memory, for blocks that are swapped.
    """

    options: Mapping[str, Any]
    gib: float
    ram_gib: float

    def way(self) -> str:
        """`int8-quanto, checkpointed, 43 blocks swapped, 1024 px`."""
        options = self.options
        parts = [options.get("base_model_precision", "bf16")]
        if options.get("gradient_checkpointing"):
            parts.append("checkpointed")
        if swapped := options.get("musubi_blocks_to_swap"):
            parts.append(f"{swapped} blocks swapped")
        return f"{', '.join(parts)}, {options['resolution']} px"

    def text(self) -> str:
        """The way, and the memory that it takes."""
        ram = f" and {self.ram_gib} GiB of main memory" if self.ram_gib else ""
        return f"{self.way()}: {self.gib} GiB{ram}"


def usable_bytes(gib: float) -> int:
    """Of a card of so many GB, what a run may take."""
    return int(_SHARE * gib * GIB - _CONTEXT)


@functools.cache
def _all_presets() -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    return json.loads(PRESETS_FILE.read_text(encoding="utf-8"))


def presets_of(family: str, flavour: str) -> dict[int, Preset | None]:
    """GB of a card -> preset, None where nothing fits; empty for a model whose shapes are not known."""
    rows = _all_presets().get(family, {}).get(flavour, {})
    return {int(gib): row and Preset(**row) for gib, row in rows.items()}


def preset_for(family: str, flavour: str, gib: float) -> Preset | None:
    """The preset of the largest known card that is not larger than this one; None where there is none."""
    fitting = [preset for card, preset in presets_of(family, flavour).items() if card <= gib]
    return fitting[-1] if fitting else None


def smallest_card(family: str, flavour: str) -> int | None:
    """GB of the smallest card that trains a LoRA of a model."""
    return next((card for card, preset in presets_of(family, flavour).items() if preset), None)
