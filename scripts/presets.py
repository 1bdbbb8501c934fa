"""Writes `simpletuner/families/presets.json`: how each model trains on cards of 8 to 80 GB.

    python scripts/presets.py [FAMILY ...]

For each card the first way that fits is taken, from the fastest on: everything in bf16, blocks recomputed, their inputs
in main memory, frozen weights in 8 bits, then in 4 bits, blocks swapped, smaller images. Memory is that of `simpletuner
plan`, from the shapes of the released models: computed, not measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from released_shapes import SHAPES, Shape, embeds_of
from torch import nn

from simpletuner.config.discovery import ConfigSource
from simpletuner.config.loading import LoadedRun, load_source
from simpletuner.families.presets import CARDS, PRESETS_FILE, usable_bytes
from simpletuner.families.registry import FAMILIES, get_spec
from simpletuner.families.spec import FamilySpec
from simpletuner.hardware import GIB
from simpletuner.models.build import build_family
from simpletuner.models.family import ModelFamily
from simpletuner.training.planning.memory import Shapes, memory_rows, read_shapes, settled
from simpletuner.training.planning.shapes import Load
from simpletuner.training.swapping import repeated_blocks

SIDES = (1024, 768, 512)
# What the wizard proposes as well: see `wizard/proposals.py`.
COMMON: Mapping[str, Any] = {
    "model_type": "lora",
    "lora_type": "standard",
    "lora_rank": 16,
    "optimizer": "adamw_bf16",
    "mixed_precision": "bf16",
    "train_batch_size": 1,
    "use_ema": False,
    "assistant_lora_strength": 0,
}
RECOMPUTED = {"gradient_checkpointing": True, "gradient_checkpointing_interval": "auto"}
OFFLOADED = RECOMPUTED | {"gradient_checkpointing_backend": "unsloth"}
# Of a flavor that trains beside an assistant LoRA: Z-Image-Turbo's takes so much, whether it is here or not.
ASSISTANT_BYTES = 340 * 10**6
# A block that keeps what it computed keeps its weights too, so every block is recomputed.
SWAPPED = {"gradient_checkpointing": True, "gradient_checkpointing_backend": "unsloth"}
# On the CPU: before they are packed, the weights may be larger than the card.
INT8 = {"base_model_precision": "int8-quanto", "quantize_via": "cpu"}
NF4 = {"base_model_precision": "nf4-bnb", "quantize_via": "cpu"}
SWAPPED_SHARES = (0.25, 0.5, 0.75, 1.0)


def ways(num_blocks: int) -> Iterator[dict[str, Any]]:
    """Options of one size, from the fastest to the slowest."""
    yield {"gradient_checkpointing": False}
    yield RECOMPUTED
    yield INT8 | RECOMPUTED
    yield INT8 | OFFLOADED
    yield NF4 | OFFLOADED
    for share in SWAPPED_SHARES:
        yield INT8 | SWAPPED | {"musubi_blocks_to_swap": round(share * num_blocks)}


class Model:
    """A released model without weights: a folder of configurations, and what was counted from them.

    Args:
        folder: new; configurations are written into it.
    """

    def __init__(self, spec: FamilySpec, flavour: str, shape: Shape, folder: Path):
        self.spec, self.flavour, self.shape, self.folder = spec, flavour, shape, folder
        write_model(spec, shape, folder / "model")
        (folder / "images").mkdir()
        (folder / "data.json").write_text(json.dumps([{"id": "images", "instance_data_dir": str(folder / "images")}]))
        self._shapes: dict[int, Shapes] = {}
        empty = self.family(self.load({})).empty_denoiser()
        self.num_parameters = sum(parameter.numel() for parameter in empty.parameters())
        self.denoiser: nn.Module = empty

    def load(self, options: Mapping[str, Any]) -> LoadedRun:
        written = {
            **COMMON,
            "model_family": self.spec.name,
            "model_flavour": self.flavour,
            "pretrained_model_name_or_path": str(self.folder / "model"),
            "data_backend_config": "data.json",
            "output_dir": "output",
            "max_train_steps": 1,
            **options,
        }
        (self.folder / "config.json").write_text(json.dumps(written))
        return load_source(ConfigSource(self.folder / "config.json", "json"), (), {}, self.folder, variables={})

    def family(self, run: LoadedRun) -> ModelFamily:
        family = build_family(run.config)
        family.device, family.dtype = torch.device("cpu"), torch.bfloat16
        return family

    def memory(self, options: Mapping[str, Any], side: int, available: int) -> tuple[int, int]:
        """(bytes of the device, bytes of swapped blocks in main memory)."""
        run = self.load({**options, "resolution": side})
        family, spec = self.family(run), self.spec
        if side not in self._shapes:
            plain = self.load({"resolution": side})
            self._shapes[side] = read_shapes(plain, self.family(plain), Load(1, side, side), [embeds_of(self.shape)])
        shapes = settled(self._shapes[side], run.config, family, self.denoiser)
        assistant = ASSISTANT_BYTES if has_assistant(spec, self.flavour) else 0
        rows, _ = memory_rows(run, family, shapes, 0, available - assistant)
        return sum(row.num_bytes for row in rows) + assistant, shapes.swapped_bytes

    def preset(self, gib: int) -> dict[str, Any] | None:
        """The first way that fits a card, or None."""
        room = usable_bytes(gib)
        num_blocks = len(repeated_blocks(self.denoiser, self.spec.block_classes))
        for side in sides_of(self.spec, self.flavour):
            for way in ways(num_blocks):
                device, ram = self.memory(way, side, room)
                if device <= room:
                    options = {"resolution": side, **way, **self.encoder_precisions(room)}
                    return {
                        "options": options,
                        "gib": round(device / GIB, 1),
                        "ram_gib": round(ram / GIB, 1),
                    }
        return None

    def encoder_precisions(self, room: int) -> dict[str, str]:
        """How text encoders are kept that do not fit as they are."""
        chosen = {}
        for number, parameters in enumerate(self.shape.encoders, 1):
            if 2 * parameters > room:
                fits = parameters <= room
                chosen[f"text_encoder_{number}_precision"] = "int8-quanto" if fits else "nf4-bnb"
        return chosen


def write_model(spec: FamilySpec, shape: Shape, folder: Path) -> None:
    """The configuration files of a model in diffusers layout."""
    parts: dict[str, Mapping[str, Any]] = {"denoiser": shape.denoiser, "vae": shape.vae}
    for part in spec.components:
        (folder / part.name).mkdir(parents=True)
        config = {"_class_name": part.class_name.rpartition(".")[2], **parts.get(part.role, {})}
        (folder / part.name / part.config_file).write_text(json.dumps(config))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": spec.pipeline_class}))


def has_assistant(spec: FamilySpec, flavour: str) -> bool:
    """Whether a flavor trains beside an assistant LoRA."""
    return "assistant_lora_path" in spec.defaults_for(flavour)


def sides_of(spec: FamilySpec, flavour: str) -> list[int]:
    """Sides that a flavor is trained at, the largest first."""
    native = int(str(spec.defaults_for(flavour).get("validation_resolution", "1024")).partition("x")[0])
    return [side for side in SIDES if side <= native]


def shape_of(spec: FamilySpec, flavour: str) -> Shape | None:
    """The shape of a flavor: its own, or that of the family's first one that has any."""
    own = SHAPES.get((spec.name, flavour))
    return own or next((shape for (family, _), shape in SHAPES.items() if family == spec.name), None)


def presets_of(name: str, cards: Sequence[int] = CARDS) -> dict[str, Any]:
    """flavour -> GB of the card -> preset, or null where nothing fits."""
    spec = get_spec(name)
    made: dict[tuple[int, bool, tuple[int, ...]], dict[str, Any]] = {}  # flavors of one shape and one size are alike
    found: dict[str, Any] = {}
    for flavour in spec.flavours:
        shape = shape_of(spec, flavour)
        if shape is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            key = id(shape), has_assistant(spec, flavour), tuple(sides_of(spec, flavour))
            if key not in made:
                model = Model(spec, flavour, shape, Path(folder))
                made[key] = {str(gib): model.preset(gib) for gib in cards}
        found[flavour] = made[key]
    return found


def main(names: Sequence[str]) -> None:
    known = json.loads(PRESETS_FILE.read_text()) if PRESETS_FILE.is_file() and names else {}
    made = {name: presets_of(name) for name in names or FAMILIES}
    PRESETS_FILE.write_text(json.dumps({**known, **made}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
