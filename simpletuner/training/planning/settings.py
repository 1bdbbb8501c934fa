"""`memory`: which settings make a run fit into the memory that it may take, chosen before anything long starts.

Ways are tried from the fastest on: everything kept; what is cheap recomputed; products of the MLPs too; blocks, as many
as needed; their inputs in main memory; the base in 8 bits; blocks swapped. Encoding has its own peaks, before the
denoiser is loaded: text encoders are packed, and the VAE gets smaller batches, then tiles. An option that somebody
wrote is never changed.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import torch

from simpletuner import storage
from simpletuner.config.dataset_loading import LoadedDatasets
from simpletuner.config.draft import Draft
from simpletuner.config.layers import Origin
from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import all_options
from simpletuner.config.paths import Folders
from simpletuner.config.rules.precision import PRECISION_RULES
from simpletuner.data.dataset import Dataset
from simpletuner.data.holdout import hold_out
from simpletuner.errors import Problem, bytes_text, plain_value
from simpletuner.families.spec import FamilySpec
from simpletuner.hardware import GIB
from simpletuner.models.build import build_family
from simpletuner.models.devices import swaps_blocks
from simpletuner.models.family import ModelFamily
from simpletuner.training.planning.encoding import TextCost, encoder_bytes, text_cost
from simpletuner.training.planning.loads import choose_prompts, largest_load
from simpletuner.training.planning.memory import (
    Row,
    Shapes,
    decode_bytes,
    device_memory,
    encode_bytes,
    largest_encoded,
    may_keep_least,
    memory_rows,
    on_demand_bytes,
    read_shapes,
    settled,
)
from simpletuner.training.planning.shapes import num_bytes
from simpletuner.training.swapping import repeated_blocks

# Of what a run may take, what is planned: allocators leave gaps, kernels want room to work.
PLANNED_SHARE = 0.94
CUDA_CONTEXT = round(0.6 * GIB)
# Decide what is computed, not only how: a resume keeps what its checkpoint was trained with.
KEPT = (
    "base_model_precision",
    "vae_batch_size",
    "vae_enable_tiling",
    *(f"text_encoder_{number}_precision" for number in range(1, 5)),
)

Settings = Mapping[str, Any]
HIGH: Settings = {"gradient_checkpointing": False, "activation_memory": "high"}
LOW: Settings = {"gradient_checkpointing": False, "activation_memory": "low"}
LOWEST: Settings = {"gradient_checkpointing": False, "activation_memory": "lowest"}
RECOMPUTED: Settings = {"gradient_checkpointing": True, "gradient_checkpointing_interval": "auto"}
OFFLOADED: Settings = {**RECOMPUTED, "gradient_checkpointing_backend": "unsloth"}
INT8: Settings = {"base_model_precision": "int8-quanto"}
# A block that keeps what it computed keeps its weights too, so every block is recomputed.
SWAPPED: Settings = {**INT8, "gradient_checkpointing": True, "gradient_checkpointing_backend": "unsloth"}
TRAINING_KEYS = ("activation_memory", *OFFLOADED, *INT8, "musubi_blocks_to_swap")
VAE_KEYS = ("vae_batch_size", "vae_enable_tiling")


@dataclass(frozen=True)
class Room:
    """Memory that a run may take.

    Args:
        device: bytes of the device that may be planned.
        main: bytes of main memory that may be planned; None where it is the device's own.
        limit: what the run may really take: on a GPU what torch allocates, else the whole process.
    """

    device: int
    main: int | None
    limit: int

    @classmethod
    def of(cls, memory: str, device: torch.device) -> Room:
        """Of `memory`: so many GB, all told, or what is free now."""
        available, held = device_memory(device), psutil.Process().memory_info().rss
        has_own = device.type == "cuda"
        if memory != "auto":
            available = min(available, int(float(memory) * GIB) - (CUDA_CONTEXT if has_own else held))
        main = int(PLANNED_SHARE * psutil.virtual_memory().available) if has_own else None
        limit = max(available, 0) + (0 if has_own else held)
        return cls(int(PLANNED_SHARE * max(available, 0)), main, limit)

    @classmethod
    def of_other(cls, memory: str, gpu: int) -> Room:
        """Of a GPU of another machine with so many bytes, whose main memory is taken to be this one's."""
        limit = gpu - CUDA_CONTEXT
        if memory != "auto":
            limit = min(limit, int(float(memory) * GIB) - CUDA_CONTEXT)
        main = int(PLANNED_SHARE * psutil.virtual_memory().available)
        return cls(int(PLANNED_SHARE * max(limit, 0)), main, max(limit, 0))


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Args:
        settings: option -> value, of those that nobody wrote.
        lines: what each stage takes, and why faster ways were not taken.
        lacking: why the run does not fit.
    """

    settings: Settings = field(default_factory=dict)
    lines: tuple[str, ...] = ()
    lacking: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Bytes that a stage takes of the device, and of main memory besides."""

    device: int
    main: int = 0

    def fits(self, room: Room) -> bool:
        return self.device <= room.device and self.main <= (self.main if room.main is None else room.main)

    def __str__(self) -> str:
        return bytes_text(self.device) + (f" and {bytes_text(self.main)} of main memory" if self.main else "")


def is_written(loaded: LoadedRun, key: str) -> bool:
    """Whether somebody wrote an option, or a checkpoint holds this run to it."""
    return loaded.origin(key).kind not in ("default", "family")


def with_settings(loaded: LoadedRun, settings: Settings) -> LoadedRun:
    """The run with these options."""
    origins = {**loaded.origins, **dict.fromkeys(settings, Origin("memory"))}
    return replace(loaded, config=loaded.config.with_values(dict(settings)), origins=origins)


def with_activation_memory(loaded: LoadedRun, device: torch.device) -> LoadedRun:
    """The run with what its blocks keep where nobody wrote it: a CPU has memory and lacks time."""
    if is_written(loaded, "activation_memory"):
        return loaded
    level = "high" if device.type == "cpu" else "low"
    return replace(loaded, config=loaded.config.with_values({"activation_memory": level}))


def keep_choice(loaded: LoadedRun, checkpoint: Path | None) -> LoadedRun:
    """The run with what `memory` chose for the checkpoint that it goes on from, where that decides the results."""
    if loaded.config.model.memory is None or checkpoint is None:
        return loaded
    saved = storage.read_json(checkpoint / "config.json", dict)
    return with_settings(loaded, {key: saved[key] for key in KEPT if key in saved and not is_written(loaded, key)})


def choose_settings(loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset], room: Room) -> Choice:
    """Choose for each stage of a run the first way that fits."""
    captions = text_cost(loaded, family, datasets)
    training = _Training(loaded, family, datasets, room, captions)
    found = [training.choose()]
    if captions is not None and captions.cost is not None:
        found.append(_Captions(loaded, family, datasets, room, captions).choose())
    rest = [row for row in training.rows if not row.name.startswith(("activations", "gradients"))]
    beside = sum(row.num_bytes for row in rest) + training.encoders
    found.append(_Vae(loaded, family, datasets, room, beside).choose())
    main = f", {bytes_text(room.main)} of main memory" if room.main is not None else ""
    first = f"up to {bytes_text(room.device)} of {family.device} are planned{main}"
    return Choice(
        {key: value for each in found for key, value in each.settings.items()},
        (first, *(line for each in found for line in each.lines)),
        tuple(problem for each in found for problem in each.lacking),
    )


class _Stage:
    """A part of a run with a peak of its own.

    Args:
        room: for this part.
    """

    name: str
    keys: tuple[str, ...]

    def __init__(self, loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset], room: Room):
        self.loaded, self.family, self.datasets, self.room = loaded, family, datasets, room

    def ways(self, loaded: LoadedRun) -> Iterator[Settings]:
        """From the fastest to the one that takes least."""
        raise NotImplementedError

    def cost(self, loaded: LoadedRun) -> Cost:
        raise NotImplementedError

    def choose(self) -> Choice:
        """The first way that fits; where none does, the last one and what is missing."""
        tried = list(self.try_ways(self.loaded))
        settings, cost = tried[-1]
        changed = {key: value for key, value in settings.items() if self.loaded.config.value(key) != value}
        lines = [f"{self.name}: {cost}{_with(settings)}"]
        lines += [f"{self.name}: it does not fit{_with(way)}, which takes {each}" for way, each in tried[:-1]]
        if cost.fits(self.room):
            return Choice(changed, tuple(lines))
        return Choice(changed, tuple(lines), (self.problem(settings, cost),))

    def try_ways(self, loaded: LoadedRun) -> Iterator[tuple[Settings, Cost]]:
        """Each way with what it takes, until one fits."""
        seen: list[Settings] = []
        for way in self.ways(loaded):
            settings = {key: value for key, value in way.items() if not is_written(loaded, key)}
            tried = with_settings(loaded, settings)
            if settings in seen or not is_sound(tried, self.family.spec):
                continue
            seen.append(settings)
            cost = self.cost(tried)
            yield settings, cost
            if cost.fits(self.room):
                return
        if not seen:
            yield {}, self.cost(loaded)

    def problem(self, settings: Settings, cost: Cost) -> Problem:
        """By how much it does not fit, and what keeps it from fitting."""
        missing = [f"{bytes_text(cost.device - self.room.device)} more than the {bytes_text(self.room.device)} planned"]
        if cost.device <= self.room.device:
            assert self.room.main is not None, "main memory is what does not suffice"
            missing = [f"{bytes_text(cost.main - self.room.main)} of main memory more than there is"]
        message = f"{self.name} takes {cost} at least{_with(settings)}: {missing[0]}"
        return Problem(message, key="memory", fix="; or ".join([*self.hindrances(), self.last_resort()]))

    def hindrances(self) -> Iterator[str]:
        """Written options without which it would fit."""
        written = [key for key in self.keys if is_written(self.loaded, key)]
        groups = [*([key] for key in written), *([written] if len(written) > 1 else [])]
        for keys in groups:
            settings, cost = list(self.try_ways(without(self.loaded, keys)))[-1]
            if cost.fits(self.room):
                names = ", ".join(f"{key} ({self.loaded.origin(key)})" for key in keys)
                yield f"remove {names}: it fits{_with(settings)}"
                return

    def last_resort(self) -> str:
        return "lower train_batch_size or resolution, or give it more memory"


class _Training(_Stage):
    name = "training"
    keys = TRAINING_KEYS

    def __init__(
        self,
        loaded: LoadedRun,
        family: ModelFamily,
        datasets: Sequence[Dataset],
        room: Room,
        captions: TextCost | None,
    ):
        super().__init__(loaded, family, datasets, room)
        config = loaded.config
        training = [each for each in hold_out(list(datasets), config.evaluation.eval_holdout) if each.kind == "image"]
        self.load = largest_load(training, config.training.train_batch_size)
        self.prompts = choose_prompts(family, training, self.load, longest=True)
        self._shapes: dict[tuple[str | None, bool], Shapes] = {}
        self.denoiser = type(family)(family.spec, family.source, torch.device("meta"), family.dtype).empty_denoiser()
        self.encoders = captions.cost.weight_bytes if captions and captions.stays and captions.cost else 0
        self.on_demand = on_demand_bytes(family, datasets, config.data.vae_batch_size)
        self.rows: list[Row] = []

    def ways(self, loaded: LoadedRun) -> Iterator[Settings]:
        yield from (HIGH, LOW, LOWEST)
        # Blocks that are swapped are recomputed, all of them.
        yield {"gradient_checkpointing": True} if swaps_blocks(loaded.config.model) else RECOMPUTED
        if self.room.main is not None:
            yield OFFLOADED
        if loaded.config.model.model_type == "full":
            return
        yield {**INT8, **RECOMPUTED}
        if self.room.main is not None:
            yield {**INT8, **OFFLOADED}
            for count in range(1, len(repeated_blocks(self.denoiser, self.family.spec.block_classes)) + 1):
                yield {**SWAPPED, "musubi_blocks_to_swap": count}

    def try_ways(self, loaded: LoadedRun) -> Iterator[tuple[Settings, Cost]]:
        """Of the ways that swap blocks only the last one counts: the others differ by one block each."""
        held: tuple[Settings, Cost] | None = None
        for settings, cost in super().try_ways(loaded):
            if held is not None and "musubi_blocks_to_swap" not in held[0]:
                yield held
            held = settings, cost
        if held is not None:
            yield held

    def shapes(self, loaded: LoadedRun) -> Shapes:
        """Measured once for each kind of activations."""
        key = loaded.config.model.activation_memory, may_keep_least(loaded)
        if key not in self._shapes:
            self._shapes[key] = read_shapes(loaded, self.family, self.load, self.prompts)
        return self._shapes[key]

    def cost(self, loaded: LoadedRun) -> Cost:
        config, family = loaded.config, _configured(self.family, loaded)
        shapes = settled(self.shapes(loaded), config, family, self.denoiser)
        activations = shapes.activations
        swapped = shapes.swapped_bytes
        self.rows, _ = memory_rows(loaded, family, shapes, self.on_demand, self.room.device - self.encoders)
        device = sum(row.num_bytes for row in self.rows) + self.encoders
        offloads = config.model.gradient_checkpointing and config.model.gradient_checkpointing_backend == "unsloth"
        waiting = swapped + (sum(activations.inputs) if offloads else 0)
        if self.room.main is None:
            return Cost(device + waiting)
        whole = num_bytes((*self.denoiser.parameters(), *self.denoiser.buffers()))
        return Cost(device, max(waiting, whole if swapped else 0))  # what is swapped is read into main memory as it is


class _Captions(_Stage):
    name = "encoding captions"

    def __init__(
        self, loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset], room: Room, captions: TextCost
    ):
        super().__init__(loaded, family, datasets, room)
        self.captions = captions
        names = [component.name for component in family.spec.components if component.role == "text_encoder"]
        self.encoders = tuple(f"text_encoder_{number}_precision" for number in range(1, len(names) + 1))
        self.keys = (*self.encoders, "text_encoder_offload")
        self.sizes = encoder_bytes(family, names)

    def ways(self, loaded: LoadedRun) -> Iterator[Settings]:
        yield {}
        large = [key for key, size in zip(self.encoders, self.sizes, strict=True) if 4 * size >= max(self.sizes)]
        yield dict.fromkeys(large, "int8-quanto")
        if self.room.main is not None:
            yield {**dict.fromkeys(large, "int8-quanto"), "text_encoder_offload": True}
        yield {**dict.fromkeys(large, "nf4-bnb"), "text_encoder_offload": self.room.main is not None}

    def cost(self, loaded: LoadedRun) -> Cost:
        if not self.captions.num_missing:
            return Cost(0)  # all captions are encoded already
        found = text_cost(loaded, _configured(self.family, loaded), self.datasets)
        waiting = sum(self.sizes) if loaded.config.precision.text_encoder_offload else 0  # they are read as they are
        return Cost(found.cost.peak_bytes if found and found.cost else 0, waiting)

    def last_resort(self) -> str:
        return "encode captions elsewhere (cache build), or give it more memory"


class _Vae(_Stage):
    """Encoding comes before the denoiser is loaded; images of validation are decoded beside it.

    Args:
        beside: bytes that are there while an image is decoded.
    """

    name = "the VAE"
    keys = VAE_KEYS

    def __init__(self, loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset], room: Room, beside: int):
        super().__init__(loaded, family, datasets, room)
        self.beside = beside
        self.size = largest_encoded(datasets)

    def ways(self, loaded: LoadedRun) -> Iterator[Settings]:
        count = loaded.config.data.vae_batch_size
        while count > 1:
            yield {"vae_batch_size": count}
            count //= 2
        yield {"vae_batch_size": 1}
        if hasattr(self.family.empty_vae(), "enable_tiling"):
            yield {"vae_batch_size": 1, "vae_enable_tiling": True}

    def cost(self, loaded: LoadedRun) -> Cost:
        config, family = loaded.config, _configured(self.family, loaded)
        peak = encode_bytes(family, *self.size, config.data.vae_batch_size)
        if not config.validation.validation_disable:
            largest = max(config.validation.validation_sizes, key=math.prod)
            peak = max(peak, self.beside + decode_bytes(family, *largest))
        return Cost(peak)


def is_sound(tried: LoadedRun, spec: FamilySpec) -> bool:
    """Whether the settings go together, as the rules of `config/rules/precision.py` say."""
    draft = Draft(tried.config, spec, LoadedDatasets(), tried.origins, Folders(Path(), None))
    return not any(list(rule(draft)) for rule in PRECISION_RULES)


def without(loaded: LoadedRun, keys: Sequence[str]) -> LoadedRun:
    """The run as if nobody had written these options."""
    infos = all_options()
    config = loaded.config.with_values({key: infos[key].default for key in keys})
    return replace(loaded, config=config, origins={k: o for k, o in loaded.origins.items() if k not in keys})


def _configured(family: ModelFamily, loaded: LoadedRun) -> ModelFamily:
    """The family with the number formats and modes of a configuration."""
    made = copy.copy(family)
    other = build_family(loaded.config)
    made.number_formats, made.vae_modes = other.number_formats, other.vae_modes
    return made


def _with(settings: Settings) -> str:
    return f" with {', '.join(f'{key} {plain_value(value)}' for key, value in settings.items())}" if settings else ""
