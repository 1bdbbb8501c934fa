"""Memory of training before it starts, from the shapes of the real modules, not from a formula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import psutil
import torch
from torch import nn

from simpletuner.activation_memory.modules import set_activation_memory
from simpletuner.adapters.assistant import find_assistant
from simpletuner.adapters.build import attach_adapter
from simpletuner.batch import PromptEmbeds
from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import TrainConfig
from simpletuner.data.dataset import Dataset
from simpletuner.models.family import ModelFamily
from simpletuner.optim.optimizers import build_optimizer
from simpletuner.precision.mixed import DTYPES
from simpletuner.precision.products import product_bytes
from simpletuner.precision.quantize import (
    NO_CHANGE,
    get_format,
    quantizable,
    quantizes_activations,
    saved_bytes,
)
from simpletuner.training.gradient_checkpointing import count_fitting
from simpletuner.training.planning.encoding import StaysOnMeta, largest_references
from simpletuner.training.planning.shapes import (
    Activations,
    Load,
    PeakBytes,
    measure_activations,
    num_bytes,
    optimizer_bytes,
    step_bytes,
)
from simpletuner.training.swapping import NUM_BUFFERS, repeated_blocks


@dataclass(frozen=True)
class Row:
    """One thing that takes room."""

    name: str
    num_bytes: int


@dataclass(frozen=True)
class Shapes:
    """What the modules of a run are like, without their values.

    Args:
        frozen_bytes: of the denoiser without the adapter.
        swapped_bytes: of them, those that wait in main memory.
        trained: the parameters that are trained, on `meta`.
        activations: at the largest size.
        least: the same of blocks that keep least, where they may: see `may_keep_least`.
        optimizer: bytes of the optimizer's state.
        update: bytes that a step of the optimizer makes besides.
        unpacked: bytes of the largest packed weight, which is unpacked for the moment of its product.
    """

    num_parameters: int
    frozen_bytes: int
    trained: dict[str, nn.Parameter]
    trained_bytes: int
    swapped_bytes: int
    activations: Activations
    optimizer: int
    update: int
    unpacked: int = 0
    least: Activations | None = None


def may_keep_least(loaded: LoadedRun) -> bool:
    """Whether `auto` lets blocks keep least (`activation_memory` `lowest`) before it forgets whole ones: where nobody
    wrote what they keep, and no compiler decides it."""
    config = loaded.config
    is_free = loaded.origin("activation_memory").kind == "default" and config.precision.dynamo_backend == "no"
    return is_free and config.model.gradient_checkpointing and config.model.gradient_checkpointing_interval == "auto"


def read_shapes(loaded: LoadedRun, family: ModelFamily, load: Load, embeds: Sequence[PromptEmbeds]) -> Shapes:
    """Build denoiser and adapter on `meta` as training builds them, and run one step's forward pass there."""
    config = loaded.config
    computes_in = DTYPES[config.precision.mixed_precision]
    empty = type(family)(family.spec, family.source, torch.device("meta"), family.dtype)
    denoiser = empty.empty_denoiser()
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    frozen, swapped = frozen_bytes(config, family, denoiser)
    packed = packed_layers(family, denoiser)
    with torch.device("meta"):
        live = attach_adapter(loaded, empty, denoiser).trainable_parameters()
    trained = {name: nn.Parameter(parameter.data) for name, parameter in live.items()}  # in dtypes of their own
    is_full = config.model.model_type == "full"
    untrained = num_bytes(parameter for parameter in denoiser.parameters() if not parameter.requires_grad)
    trained_bytes = num_bytes(trained.values())

    def make_optimizer(tried: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
        return build_optimizer(config.optimizer, tried, config.training.seed)

    optimizer, update = optimizer_bytes(trained, make_optimizer), step_bytes(trained, make_optimizer)
    for parameter in denoiser.parameters():
        parameter.data = parameter.data.to(computes_in)
    empty.dtype = computes_in
    activations = measure_activations(empty, denoiser, load.height, load.width, embeds, load.references)
    least = None
    if may_keep_least(loaded):
        set_activation_memory(denoiser, "lowest")
        least = measure_activations(empty, denoiser, load.height, load.width, embeds, load.references)
    if is_full:
        frozen = untrained
    unpacked = unpacked_bytes(family, packed, computes_in, activations.num_tokens)
    return Shapes(count, frozen, trained, trained_bytes, swapped, activations, optimizer, update, unpacked, least)


def frozen_bytes(config: TrainConfig, family: ModelFamily, denoiser: nn.Module) -> tuple[int, int]:
    """(bytes of the frozen weights; of them, those that wait in main memory).

    Args:
        family: its number formats are those of `config`.
        denoiser: on any device, without an adapter.
    """
    spec, precision = family.spec, family.number_formats.base
    frozen = num_bytes((*denoiser.parameters(), *denoiser.buffers()))
    frozen -= saved_bytes(denoiser, precision, spec.block_classes, spec.unquantized)
    return frozen, swapped_bytes(config, family, denoiser)


def settled(shapes: Shapes, config: TrainConfig, family: ModelFamily, denoiser: nn.Module) -> Shapes:
    """The shapes with the frozen weights as `config` keeps them; `family` and `denoiser` as in `frozen_bytes`."""
    if config.model.model_type == "full":
        return shapes
    frozen, swapped = frozen_bytes(config, family, denoiser)
    computes_in, num_tokens = DTYPES[config.precision.mixed_precision], shapes.activations.num_tokens
    unpacked = unpacked_bytes(family, packed_layers(family, denoiser), computes_in, num_tokens)
    return replace(shapes, frozen_bytes=frozen, swapped_bytes=swapped, unpacked=unpacked)


def memory_rows(
    loaded: LoadedRun, family: ModelFamily, shapes: Shapes, on_demand: int, available: int
) -> tuple[list[Row], list[Row]]:
    """(what training takes, what its activations would take with other settings).

    Args:
        on_demand: see `on_demand_bytes`.
        available: bytes of the device, which decide how many blocks `auto` recomputes.
    """
    config = loaded.config
    count = sum(parameter.numel() for parameter in shapes.trained.values())
    rows = [
        Row("frozen weights", shapes.frozen_bytes - shapes.swapped_bytes),
        Row("trained weights", shapes.trained_bytes),
        Row("gradients", shapes.trained_bytes),
        Row(f"state of {config.optimizer.optimizer}", shapes.optimizer),
        Row("EMA, float32", 4 * count if config.training.use_ema else 0),
    ]
    if (assistant := find_assistant(config, fetches=False)) is not None:
        rows.append(Row("assistant LoRA, frozen", assistant.stat().st_size))
    if config.precision.mixed_precision != "no":
        wide = [parameter for parameter in shapes.trained.values() if parameter.dtype == torch.float32]
        rows.append(Row("16-bit copies of trained weights", 2 * sum(parameter.numel() for parameter in wide)))
    is_in_8_bits = quantizes_activations(family.number_formats)
    rows.append(Row("one product in 8 bits" if is_in_8_bits else "one unpacked matrix", shapes.unpacked))
    rows.append(Row("VAE, encoding on demand", on_demand))
    free = available - sum(row.num_bytes for row in rows)
    chosen, others = activation_rows(config, shapes.activations, free, shapes.least)
    # The activations are gone when the optimizer takes its step, so what it makes has their room.
    update = Row(
        f"a step of {config.optimizer.optimizer}, beyond the activations", max(shapes.update - chosen.num_bytes, 0)
    )
    return [row for row in (*rows, chosen, update) if row.num_bytes], others


def packed_layers(family: ModelFamily, denoiser: nn.Module) -> list[nn.Linear]:
    """The layers of a denoiser of any device that `base_model_precision` packs."""
    precision, spec = family.number_formats.base, family.spec
    if precision == NO_CHANGE:
        return []
    return [layer for _, layer in quantizable(denoiser, get_format(precision), spec.block_classes, spec.unquantized)]


def unpacked_bytes(family: ModelFamily, packed: Sequence[nn.Linear], computes_in: torch.dtype, num_tokens: int) -> int:
    """What a product with a packed weight makes for its moment: the unpacked matrix, or all that 8 bits need."""
    found = [layer.weight.numel() * computes_in.itemsize for layer in packed]
    if quantizes_activations(family.number_formats):
        found += [product_bytes(num_tokens, layer.out_features, layer.in_features) for layer in packed]
    return max(found, default=0)


def activation_rows(
    config: TrainConfig, activations: Activations, free: int, least: Activations | None = None
) -> tuple[Row, list[Row]]:
    """(activations as configured, those of the other ways to recompute).

    Args:
        free: bytes that are left for them.
        least: see `Shapes`.
    """
    num_blocks = len(activations.inside)
    offloads = config.model.gradient_checkpointing_backend == "unsloth"
    keeps_least = least is not None and bool(mix_that_fits(activations, free, offloads))
    if least is not None and keeps_least:
        activations = least
    interval = config.model.gradient_checkpointing_interval or "1"
    ways = {
        "without gradient_checkpointing": range(0),
        "with gradient_checkpointing_interval auto": mix_that_fits(activations, free, offloads),
        "with gradient_checkpointing": range(0, num_blocks - 1, 1 if interval == "auto" else int(interval)),
    }
    used = list(ways)[0 if not config.model.gradient_checkpointing else 1 if interval == "auto" else 2]
    recomputed = ways.pop(used)
    is_whole = 0 < len(recomputed) == num_blocks - 1
    how = ", checkpointed" if is_whole else _share(recomputed, num_blocks)
    how += ", activation_memory lowest" if keeps_least else ""
    others = [
        Row(f"activations {way}{_share(blocks, num_blocks)}", activations.peak(blocks, offloads))
        for way, blocks in ways.items()
    ]
    return Row(f"activations{how}", activations.peak(recomputed, offloads)), others


def _share(recomputed: range, num_blocks: int) -> str:
    """Says how many blocks are recomputed where that is neither none nor all but the last, which never is."""
    some = 0 < len(recomputed) < num_blocks - 1
    return f", {len(recomputed)} of {num_blocks} blocks checkpointed" if some else ""


def mix_that_fits(activations: Activations, free: int, offloads: bool = False) -> range:
    """The blocks that `auto` recomputes where `free` bytes are left for activations."""
    counts = activations.inside
    num_blocks = len(counts)
    if not num_blocks:
        return range(0)
    measured = {counts.index(count) for count in counts}  # the first block of each kind, as a run measures
    first_step = activations.peak([index for index in range(num_blocks) if index not in measured], offloads)
    return range(num_blocks - count_fitting(free - first_step, counts, sum(counts[index] for index in measured)))


def swapped_bytes(config: TrainConfig, family: ModelFamily, denoiser: nn.Module) -> int:
    """Of the frozen weights, those that the device does not hold: it has two buffers of the largest block's size."""
    spec, precision = family.spec, family.number_formats.base
    blocks = repeated_blocks(denoiser, spec.block_classes)
    count = len(blocks) if config.model.enable_group_offload else min(config.model.musubi_blocks_to_swap, len(blocks))
    return swapped_out(blocks[len(blocks) - count :], precision, spec.unquantized)


def swapped_out(blocks: Sequence[nn.Module], precision: str, kept: Sequence[str]) -> int:
    """Bytes of swapped blocks that the device does not hold.

    Args:
        kept: patterns of paths whose layers are not packed.
    """
    sizes = [
        num_bytes((*block.parameters(), *block.buffers())) - saved_bytes(block, precision, (), kept) for block in blocks
    ]
    return max(sum(sizes) - NUM_BUFFERS * max(sizes, default=0), 0)


def encode_bytes(family: ModelFamily, height: int, width: int, batch_size: int) -> int:
    """The VAE in float32 and the most that it makes while it encodes a batch of images, from shapes alone."""
    vae: Any = family.empty_vae()
    pixels = torch.empty(batch_size, 3, height, width, device="meta")
    with torch.no_grad(), PeakBytes() as made, StaysOnMeta():
        family.encode_images(vae, pixels)
    return num_bytes(vae.parameters()) + num_bytes([pixels]) + made.peak


def largest_encoded(datasets: Sequence[Dataset]) -> tuple[int, int]:
    """(height, width) of the largest image that the VAE encodes, references included."""
    sizes = [size for dataset in datasets for size in (*dataset.buckets, *largest_references([dataset]))]
    return max(sizes, key=math.prod)


def on_demand_bytes(family: ModelFamily, datasets: Sequence[Dataset], batch_size: int) -> int:
    """The VAE and what it makes where it encodes in a thread beside the training steps; 0 where all is encoded before.

    Args:
        batch_size: `vae_batch_size`.
    """
    encoding = [dataset for dataset in datasets if dataset.encodes_on_demand]
    return encode_bytes(family, *largest_encoded(encoding), batch_size) if encoding else 0


def decode_bytes(family: ModelFamily, height: int, width: int) -> int:
    """The VAE in float32 and the most that it makes while it decodes one image, from shapes alone."""
    vae: Any = family.empty_vae()
    factor, channels = family.spec.vae_factor, family.spec.latent_channels
    latents = torch.empty(1, channels, height // factor, width // factor, device="meta")
    with torch.no_grad(), PeakBytes() as made:
        family.decode_latents(vae, latents)
    return num_bytes(vae.parameters()) + made.peak


def device_memory(device: torch.device) -> int:
    """Bytes that are available now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
