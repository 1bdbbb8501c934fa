"""What a training step of the full-size OmniGen costs on a GPU, with random weights: seconds and peak memory.

3.8 billion parameters, 1024 px, batch 1, LoKr of attention and MLP (`config/lycoris_config.json.example`), adamw_bf16.
Each row runs in a process of its own; one that fails or takes too long says so and the next one begins. The last line
is one JSON object. Goals, on an H100: under 0.30 s at 14 GiB, under 0.40 s at 10 GiB; exit code 1 where one is missed,
2 on a machine without CUDA.

    python benchmarks/full_size.py [--rows plain,recomputed] [--steps 20] [--pixels 1024] [--batch 1] [--minutes 8]
    python benchmarks/full_size.py --tiny      # every row on a tiny shape, on the processor: does it run?
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner.adapters.lycoris import LycorisAdapter, attach_lycoris
from simpletuner.commands.shapes import empty_batch
from simpletuner.examples import example_dir
from simpletuner.lean.modules import make_lean
from simpletuner.models.components import ModelSource
from simpletuner.models.omnigen.denoiser import install
from simpletuner.models.omnigen.family import OmniGen
from simpletuner.models.registry import get_spec
from simpletuner.optim.clipping import clip_by_value
from simpletuner.optim.optimizers import build_optimizer
from simpletuner.precision.mixed import autocast
from simpletuner.precision.quantise import NumberFormats
from simpletuner.training.kernels import compile_blocks
from simpletuner.training.recomputing import Recomputing
from simpletuner.training.step import compute_losses, draw_noise
from simpletuner.training.swapping import move_with_swap, repeated_blocks

REPOSITORY = Path(__file__).resolve().parent.parent
PROMPT = "a red fox with a green scarf sits on a stone wall in the rain, soft light of an early morning in autumn"
WARM_UP = 3

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
class Row:
    """One way to take a step.

    Args:
        card_gib: of the card's free memory, what may be used; the rest is taken away.
        goal: (seconds, GiB) on an H100, or None.
    """

    precision: str = "no_change"
    recomputes: bool = False
    measures_room: bool = False
    parks_inputs: bool = False
    swaps: bool = False
    backend: str = "no"
    card_gib: float | None = None
    goal: tuple[float, float] | None = None


ROWS = {
    "plain": Row(),
    "recomputed to fit 15.5 GiB": Row(recomputes=True, measures_room=True, card_gib=15.5, goal=(0.30, 14.0)),
    "recomputed": Row(recomputes=True, goal=(0.40, 10.0)),
    "int8": Row(precision="int8-quanto"),
    "int8 recomputed": Row(precision="int8-quanto", recomputes=True),
    "fp8 recomputed": Row(precision="fp8-torchao", recomputes=True),
    "nf4 recomputed": Row(precision="nf4-bnb", recomputes=True),
    "int4 recomputed": Row(precision="int4-quanto", recomputes=True),
    "int8 inputs in main memory": Row(precision="int8-quanto", recomputes=True, parks_inputs=True),
    "int8 all blocks swapped": Row(precision="int8-quanto", recomputes=True, swaps=True),
    "compiled": Row(backend="inductor"),
    "compiled recomputed": Row(backend="inductor", recomputes=True),
    "compiled int8 recomputed": Row(backend="inductor", precision="int8-quanto", recomputes=True),
}


class RandomOmniGen(OmniGen):
    """OmniGen of any shape with random weights, made on the device; its tokenizer is the shipped example's."""

    def __init__(self, shape: dict[str, Any], device: torch.device):
        source = ModelSource(str(example_dir("omnigen-tiny") / "model"))
        super().__init__(get_spec("omnigen"), source, device, torch.bfloat16)
        self.shape = shape

    def load_denoiser(self) -> nn.Module:
        from diffusers.models.transformers.transformer_omnigen import OmniGenTransformer2DModel

        torch.manual_seed(0)
        usual = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with torch.device(self.device):
                denoiser = OmniGenTransformer2DModel(
                    pad_token_id=32000,
                    max_position_embeddings=131072,
                    original_max_position_embeddings=4096,
                    **self.shape,
                )
        finally:
            torch.set_default_dtype(usual)
        for tensor in (*denoiser.parameters(), *denoiser.buffers()):  # a few buffers are made in float32
            tensor.data = tensor.data.to(self.dtype)
        return install(make_lean(denoiser.eval().requires_grad_(False)))


def lokr_of_the_example(denoiser: nn.Module, family: OmniGen) -> LycorisAdapter:
    """Attach what `config/lycoris_config.json.example` says, in bf16."""
    lycoris = json.loads((REPOSITORY / "config" / "lycoris_config.json.example").read_text(encoding="utf-8"))
    return attach_lycoris(denoiser, lycoris, family.spec, torch.bfloat16, seed=0)


def measure(row: Row, shape: dict[str, Any], device: torch.device, pixels: int, batch_size: int, steps: int) -> dict:
    """Seconds per step and peak memory of one row."""
    taken = take_memory(device, row.card_gib)
    family = RandomOmniGen(shape, device)
    family.number_formats = NumberFormats(base=row.precision, packs_on_device=not row.swaps)
    denoiser = family.load_base()
    adapter = lokr_of_the_example(denoiser, family)
    blocks = family.spec.block_classes
    move_with_swap(denoiser, blocks, len(repeated_blocks(denoiser, blocks)) if row.swaps else 0, device)
    recomputing = Recomputing(device, is_measured=row.measures_room, parks_inputs=row.parks_inputs)
    if row.recomputes:
        denoiser.enable_gradient_checkpointing(recomputing)
    compile_blocks(denoiser, blocks, row.backend)
    kernels = adapter.choose_kernels(device, torch.bfloat16, {}) if row.backend == "no" else []
    denoiser.train()
    parameters = adapter.trainable_parameters()
    optimizer = build_optimizer("adamw_bf16", parameters, {"learning_rate": 1e-4})
    batch = empty_batch(family, pixels, pixels, family.encode_prompts([PROMPT] * batch_size))
    is_cuda = device.type == "cuda"
    seconds = []
    for step in range(WARM_UP + steps):
        if is_cuda and step == WARM_UP:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        started = now(device)
        quantiles = torch.full((batch_size,), (step % 10 + 0.5) / 10, dtype=torch.float64)
        with autocast(device, "bf16"):
            losses = compute_losses(family, denoiser, batch, draw_noise(batch, 0, step), quantiles)
        losses.weighted_sum.backward()
        clip_by_value(parameters.values(), 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recomputing.after_step()
        seconds.append(now(device) - started)
    peak = torch.cuda.max_memory_allocated(device) if is_cuda else None
    reserved = torch.cuda.max_memory_reserved(device) if is_cuda else None
    return {
        "seconds": round(statistics.median(seconds[WARM_UP:]), 4),
        "peak_gib": None if peak is None else round((peak - taken.nbytes) / 2**30, 2),
        "reserved_gib": None if reserved is None else round((reserved - taken.nbytes) / 2**30, 2),
        "kernels": kernels,
        "parameters": sum(p.numel() for p in denoiser.parameters() if not p.requires_grad),
        "trained": sum(p.numel() for p in parameters.values()),
    }


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


def in_its_own_process(command: Sequence[str], timeout: float) -> dict:
    """A row whose memory and failures are its own: its figures, or what went wrong."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=max(timeout, 1))
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {timeout:.0f} s"}
    lines = (result.stderr if result.returncode else result.stdout).strip().splitlines()
    if result.returncode:
        return {"error": lines[-1] if lines else f"ended with {result.returncode} and without a word"}
    return json.loads(lines[-1])


def is_missed(row: Row, found: dict) -> bool:
    if row.goal is None:
        return False
    return "error" in found or found["seconds"] > row.goal[0] or found["peak_gib"] > row.goal[1]


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of: {', '.join(ROWS)}")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=8, help="for all rows together")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the processor")
    parser.add_argument("--one", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    arguments.names = [name.strip() for name in arguments.rows.split(",")]
    if unknown := set(arguments.names) - set(ROWS):
        parser.error(f"no row is called {', '.join(sorted(unknown))}")
    return arguments


def main(words: Sequence[str] | None = None) -> int:
    arguments = parse(words)
    if not arguments.tiny and not torch.cuda.is_available():
        print("this machine has no CUDA device: there is nothing to measure (--tiny tries every row on the processor)")
        return 2
    shape, device = (TINY, torch.device("cpu")) if arguments.tiny else (FULL, torch.device("cuda", 0))
    pixels, steps = (64, 1) if arguments.tiny else (arguments.pixels, arguments.steps)
    if arguments.one:
        print(json.dumps(measure(ROWS[arguments.one], shape, device, pixels, arguments.batch, steps)))
        return 0
    command = [sys.executable, __file__, *["--tiny"] * arguments.tiny]
    command += [f"--{key}={getattr(arguments, key)}" for key in ("pixels", "batch", "steps")]
    ends = time.monotonic() + 60 * arguments.minutes
    figures = {}
    for name in arguments.names:
        figures[name] = in_its_own_process([*command, f"--one={name}"], ends - time.monotonic())
        print(f"{name}: {figures[name]}", flush=True)
    device_name = "processor, tiny shape" if arguments.tiny else torch.cuda.get_device_name()
    rows = {name: {**asdict(ROWS[name]), **found} for name, found in figures.items()}
    print(json.dumps({"benchmark": "full_size", "device": device_name, "torch": torch.__version__, "rows": rows}))
    if arguments.tiny:
        return int(any("error" in found for found in figures.values()))
    return int(any(is_missed(ROWS[name], found) for name, found in figures.items()))


if __name__ == "__main__":
    sys.exit(main())
