"""Full-size rows of `gpu.py`: what a training step costs in seconds and memory, one way to take it after the other.

OmniGen with 3.8 billion random parameters, LoKr of attention and MLP (`config/lycoris_config.json.example`), and other
families with a LoRA of rank 16 on their usual layers; adamw_bf16. Beside each peak stands what `simpletuner plan` would
have said, from shapes alone.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from random_families import FULL as FULL_NETWORKS
from random_families import TINY as TINY_NETWORKS
from random_families import random_family, random_module
from torch import nn

from simpletuner.activation_memory.modules import ActivationMemory, reduce_activation_memory, set_activation_memory
from simpletuner.adapters.base import Adapter
from simpletuner.adapters.full import FullAdapter
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import LycorisAdapter, attach_lycoris
from simpletuner.batch import Batch
from simpletuner.config.options.optimizer import OptimizerOptions
from simpletuner.examples import example_dir
from simpletuner.families.registry import get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.models.omnigen.denoiser import install
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.optim.clipping import clip_by_value
from simpletuner.optim.optimizers import build_optimizer
from simpletuner.precision.mixed import autocast, deterministic_kernels
from simpletuner.precision.product_trials import choose_products
from simpletuner.precision.quantize import NumberFormats, saved_bytes
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.kernels import compile_blocks
from simpletuner.training.planning.memory import mix_that_fits, swapped_out
from simpletuner.training.planning.shapes import empty_batch, measure_activations, num_bytes, optimizer_bytes
from simpletuner.training.step import compute_losses, sample_noise
from simpletuner.training.swapping import move_with_swap, repeated_blocks

REPOSITORY = Path(__file__).resolve().parent.parent
PROMPT = "a red fox with a green scarf sits on a stone wall in the rain, soft light of an early morning in autumn"
WARM_UP, RANK = 3, 16

FULL: dict[str, Any] = {
    "hidden_size": 3072,
    "num_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 8192,
    "vocab_size": 32064,
    "pos_embed_max_size": 192,
    "time_step_dim": 256,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 48, "long_factor": [3.0] * 48},
}
TINY: dict[str, Any] = FULL | {
    "hidden_size": 64,
    "num_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 128,
    "pos_embed_max_size": 16,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [3.0] * 8},
}


@dataclass(frozen=True)
class Setting:
    """Where and how large: full size on a GPU, or a tiny shape on the CPU to see that everything runs."""

    is_full: bool
    device: torch.device
    pixels: int
    batch_size: int = 1
    steps: int = 20

    @property
    def shape(self) -> dict[str, Any]:
        return FULL if self.is_full else TINY


def setting_of(is_tiny: bool, pixels: int = 1024, batch_size: int = 1, steps: int = 20) -> Setting:
    if is_tiny:
        return Setting(False, torch.device("cpu"), 64, batch_size, 1)
    return Setting(True, torch.device("cuda", 0), pixels, batch_size, steps)


@dataclass(frozen=True)
class Row:
    """One way to take a step.

    Args:
        products: in 8 bits, as `quantize_activations` has them.
        family: OmniGen with the LoKr of the example; all others with a LoRA of rank 16 on their usual layers.
        trains_all: all weights in bf16, in place of an adapter.
        level: `activation_memory`.
        card_gib: of the card's free memory, what may be used; the rest is taken away.
        goal: (seconds, GiB) on an H100, or None.
    """

    precision: str = "no_change"
    products: bool = False
    recomputes: bool = False
    measures_memory: bool = False
    offloads_inputs: bool = False
    swaps: bool = False
    backend: str = "no"
    deterministic: bool = False
    trains_all: bool = False
    level: ActivationMemory = "low"
    card_gib: float | None = None
    goal: tuple[float, float] | None = None
    family: str = "omnigen"


ROWS = {
    "plain": Row(),
    "lowest": Row(level="lowest"),
    "high": Row(level="high"),
    "recomputed to fit 15.5 GiB": Row(recomputes=True, measures_memory=True, card_gib=15.5, goal=(0.30, 14.0)),
    "recomputed": Row(recomputes=True, goal=(0.40, 10.0)),
    "plain deterministic": Row(deterministic=True),
    "recomputed deterministic": Row(recomputes=True, deterministic=True),
    "inputs in main memory": Row(recomputes=True, offloads_inputs=True),
    "all blocks swapped": Row(recomputes=True, swaps=True),
    "all weights by measure": Row(recomputes=True, measures_memory=True, trains_all=True),
    "int8": Row(precision="int8-quanto"),
    "int8 recomputed": Row(precision="int8-quanto", recomputes=True),
    "fp8 recomputed": Row(precision="fp8-torchao", recomputes=True),
    "int8 products recomputed": Row(precision="int8-torchao", products=True, recomputes=True),
    "fp8 products recomputed": Row(precision="fp8-torchao", products=True, recomputes=True),
    "nf4 recomputed": Row(precision="nf4-bnb", recomputes=True),
    "int4 recomputed": Row(precision="int4-quanto", recomputes=True),
    "int8 inputs in main memory": Row(precision="int8-quanto", recomputes=True, offloads_inputs=True),
    "int8 all blocks swapped": Row(precision="int8-quanto", recomputes=True, swaps=True),
    "compiled": Row(backend="inductor"),
    "compiled recomputed": Row(backend="inductor", recomputes=True),
    "compiled int8 recomputed": Row(backend="inductor", precision="int8-quanto", recomputes=True),
}


# Of every other family the same few, those first that most people run.
WAYS = {
    "plain": Row(),
    "lowest": Row(level="lowest"),
    "recomputed": Row(recomputes=True),
    "fp8 recomputed": Row(precision="fp8-torchao", recomputes=True),
    "fp8 products recomputed": Row(precision="fp8-torchao", products=True, recomputes=True),
    "int8 recomputed": Row(precision="int8-quanto", recomputes=True),
    "int8 products recomputed": Row(precision="int8-torchao", products=True, recomputes=True),
    "nf4 recomputed": Row(precision="nf4-bnb", recomputes=True),
    "compiled": Row(backend="inductor"),
}
FAMILY_ROWS = {
    f"{family} {way}": replace(row, family=family)
    for family in ("flux", "sdxl", "z_image", "qwen_image")
    for way, row in WAYS.items()
}


class RandomOmniGen(OmniGen):
    """OmniGen of any shape with random weights, made on the device; its tokenizer is the shipped example's."""

    def __init__(self, shape: dict[str, Any], device: torch.device):
        source = ModelSource(str(example_dir("omnigen-tiny") / "model"))
        super().__init__(get_spec("omnigen"), source, device, torch.bfloat16)
        self.shape = shape

    def public(self) -> nn.Module:
        """diffusers' own, as published."""
        from diffusers.models.transformers.transformer_omnigen import OmniGenTransformer2DModel

        limits = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
        return random_module(
            lambda: OmniGenTransformer2DModel(pad_token_id=32000, **limits, **self.shape), self.device, self.dtype
        )

    def load_denoiser(self) -> nn.Module:
        return install(reduce_activation_memory(self.public(), self.spec.block_classes))


def lokr_of_the_example(denoiser: nn.Module, family: ModelFamily) -> LycorisAdapter:
    """Attach what `config/lycoris_config.json.example` says, in bf16."""
    lycoris = json.loads((REPOSITORY / "config" / "lycoris_config.json.example").read_text(encoding="utf-8"))
    return attach_lycoris(denoiser, lycoris, family.spec, torch.bfloat16, seed=0)


def family_of(row: Row, setting: Setting, device: torch.device) -> ModelFamily:
    if row.family == "omnigen":
        return RandomOmniGen(setting.shape, device)
    return random_family(row.family, (FULL_NETWORKS if setting.is_full else TINY_NETWORKS)[row.family], device)


def adapter_of(row: Row, denoiser: nn.Module, family: ModelFamily) -> Adapter:
    """A new adapter in bf16, attached."""
    if row.family == "omnigen":
        return lokr_of_the_example(denoiser, family)
    return attach_lora(denoiser, LoraSettings(rank=RANK), family.spec, torch.bfloat16, seed=0)


class Step:
    """A training step of one row, set up and ready to be taken."""

    def __init__(self, row: Row, setting: Setting):
        device = setting.device
        self.row, self.setting = row, setting
        self.family = family_of(row, setting, device)
        self.family.number_formats = NumberFormats(row.precision, row.products, packs_on_device=not row.swaps)
        self.denoiser: Any = self.family.load_base()
        adapter: Adapter = (
            FullAdapter(self.denoiser.requires_grad_(True), self.family.spec)
            if row.trains_all
            else adapter_of(row, self.denoiser, self.family)
        )
        set_activation_memory(self.denoiser, row.level)
        blocks = self.family.spec.block_classes
        move_with_swap(self.denoiser, blocks, len(repeated_blocks(self.denoiser, blocks)) if row.swaps else 0, device)
        self.recomputing = GradientCheckpointing(
            device, is_measured=row.measures_memory, offloads_inputs=row.offloads_inputs
        )
        if row.recomputes:
            self.denoiser.enable_gradient_checkpointing(self.recomputing)
        compile_blocks(self.denoiser, blocks, row.backend)
        chooses = row.backend == "no" and not row.deterministic
        self.kernels = adapter.choose_kernels(device, torch.bfloat16, {}) if chooses else []
        self.kernels += choose_products(self.denoiser, device, torch.bfloat16, {}, chooses)
        self.denoiser.train()
        self.parameters = adapter.trainable_parameters()
        self.optimizer = build_optimizer(OptimizerOptions(optimizer="adamw_bf16", learning_rate=1e-4), self.parameters)
        self.batch = self.batch_of(setting.pixels)

    def batch_of(self, pixels: int) -> Batch:
        return empty_batch(self.family, pixels, pixels, self.family.encode_prompts([PROMPT] * self.setting.batch_size))

    def take(self, number: int, batch: Batch | None = None) -> None:
        """Forward, backward, clip, update."""
        batch = batch or self.batch
        quantiles = torch.full((len(batch),), (number % 10 + 0.5) / 10, dtype=torch.float64)
        with autocast(self.setting.device, "bf16"):
            losses = compute_losses(self.family, self.denoiser, batch, sample_noise(batch, 0, number), quantiles)
        losses.weighted_sum.backward()
        clip_by_value(self.parameters.values(), 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.recomputing.after_step()


step_of = Step


def measure(row: Row, setting: Setting) -> dict[str, Any]:
    """Seconds per step, peak memory and planned memory of one row."""
    device = setting.device
    is_cuda = device.type == "cuda"
    taken = take_memory(device, row.card_gib)
    with deterministic_kernels(row.deterministic):
        step, seconds = step_of(row, setting), []
        for number in range(WARM_UP + setting.steps):
            if is_cuda and number == WARM_UP:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            started = now(device)
            step.take(number)
            seconds.append(now(device) - started)
    peak = torch.cuda.max_memory_allocated(device) if is_cuda else None
    reserved = torch.cuda.max_memory_reserved(device) if is_cuda else None
    return {
        "seconds": round(statistics.median(seconds[WARM_UP:]), 4),
        "peak_gib": None if peak is None else round((peak - taken.nbytes) / 2**30, 2),
        "planned_gib": round(planned_bytes(row, setting, step) / 2**30, 2),
        "reserved_gib": None if reserved is None else round((reserved - taken.nbytes) / 2**30, 2),
        "kernels": step.kernels,
        "parameters": sum(p.numel() for p in step.denoiser.parameters()),
        "trained": sum(p.numel() for p in step.parameters.values()),
    }


def planned_bytes(row: Row, setting: Setting, step: Step) -> int:
    """What the functions of `simpletuner plan` say, from modules on `meta`."""
    family = family_of(row, setting, torch.device("meta"))
    denoiser = family.load_denoiser()
    spec = family.spec
    frozen = num_bytes((*denoiser.parameters(), *denoiser.buffers()))
    frozen -= saved_bytes(denoiser, row.precision, spec.block_classes, spec.unquantized)
    if row.swaps:
        frozen -= swapped_out(repeated_blocks(denoiser, spec.block_classes), row.precision, spec.unquantized)
    if row.trains_all:
        trained, frozen = FullAdapter(denoiser.requires_grad_(True), spec).trainable_parameters(), 0
    else:
        with torch.device("meta"):
            trained = adapter_of(row, denoiser, family).trainable_parameters()
    state = optimizer_bytes(
        trained, lambda tried: build_optimizer(OptimizerOptions(optimizer="adamw_bf16", learning_rate=1e-4), tried)
    )
    embeds = step.family.encode_prompts([PROMPT] * setting.batch_size)
    set_activation_memory(denoiser, row.level)
    activations = measure_activations(family, denoiser, setting.pixels, setting.pixels, embeds)
    count = len(activations.inside)
    others = frozen + 2 * num_bytes(trained.values()) + state
    recomputed = range(count - 1) if row.recomputes else range(0)
    if row.measures_memory:
        free = int((row.card_gib or 80) * 2**30) if setting.device.type == "cpu" else free_bytes(setting, row)
        recomputed = mix_that_fits(activations, free - others)
    return others + activations.peak(recomputed, row.offloads_inputs)


def free_bytes(setting: Setting, row: Row) -> int:
    """What the row could use when it began."""
    total = torch.cuda.mem_get_info(setting.device)[1]
    return min(total, int(row.card_gib * 2**30)) if row.card_gib else total


def take_memory(device: torch.device, left_gib: float | None) -> torch.Tensor:
    """Takes what is free on a GPU beyond `left_gib`, so that the row runs as on a smaller card."""
    free = 0
    if left_gib is not None and device.type == "cuda":
        free = max(torch.cuda.mem_get_info(device)[0] - int(left_gib * 2**30), 0)
    return torch.empty(free, dtype=torch.uint8, device=device)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def is_missed(row: Row, found: dict) -> bool:
    if row.goal is None:
        return False
    return "error" in found or found["seconds"] > row.goal[0] or found["peak_gib"] > row.goal[1]
