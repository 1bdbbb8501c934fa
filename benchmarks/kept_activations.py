"""What one forward pass keeps for its backward pass, for every family: this project beside diffusers with PEFT.

Counted on torch's `meta` device at the released shapes, as `simpletuner plan` counts: 1024 px, batch 1, bf16, fused
attention, no gradient checkpointing, an adapter of rank 16 (LoKr: factor 16) on the family's default layers, which are
those of attention. Published means diffusers' class as it is with PEFT's adapter. For OmniGen it is diffusers' class
with its dense mask. OmniGen2 has no public class in diffusers: there it means Lumina2's blocks, of which the reference
implementation is made. Qwen-Image 2.1's public class cannot run on `meta`: there it means its blocks.

    python benchmarks/kept_activations.py [FAMILY ...] [--adapter lora|dora|lokr] [--lowest]

The limit of a row is `--limit` (0.70, a UNet 0.75, with --lowest 0.50 for all), or 1.03 times its floor where that is
more: what blocks must keep at least without a product more. That is the inputs of its norms, queries, keys and values
as they were projected, what attention made of them, and (without --lowest) the projection into the MLP. `norms_fused`
counts RMSNorm on both sides as GPUs have it, as one kernel that keeps its input alone, and is what the limit is for;
the other figure counts it as torch has it on `meta` and on CPUs, in pieces. With --lowest, `products` is the share of
products that are made twice. The last line is one JSON object; the exit code is 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from operations import Kernels
from public_models import RANK, published
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from simpletuner.activation_memory.modules import set_activation_memory
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.adapters.targets import lora_layers
from simpletuner.batch import PromptEmbeds
from simpletuner.families.registry import FAMILIES, get_family_class, get_spec
from simpletuner.hardware import GIB
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.training.planning.shapes import FusedAttention, SavedBytes, measure_activations

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from presets import shape_of, write_model
from released_shapes import embeds_of

META = torch.device("meta")
UNETS = ("sdxl", "sd15", "kolors")
LIMIT, UNET_LIMIT, LOWEST_LIMIT = 0.70, 0.75, 0.50
OF_THE_FLOOR = 1.03
# (rows of the hidden width in all blocks, those of the projections into the MLP, hidden width). A double block keeps
# its input and the middle of its residual stream, query, key and value, what attention makes, and four for the MLP; a
# single block has no middle. One of PixArt-Sigma has two, and a second attention whose keys and values are text.
FLOORS = {
    "flux": ((19 * (1 + 1 + 3 + 1) + 38 * (1 + 3 + 1)) * (4096 + 512), (19 + 38) * 4 * (4096 + 512), 3072),
    "chroma": ((19 * (1 + 1 + 3 + 1) + 38 * (1 + 3 + 1)) * (4096 + 300), (19 + 38) * 4 * (4096 + 300), 3072),
    "pixart_sigma": (28 * ((1 + 2 + 3 + 1 + 1 + 1) * 4096 + 2 * 300), 28 * 4 * 4096, 1152),
}
FACTOR = 16


class FusedNorms(TorchFunctionMode):
    """RMSNorm as one kernel, which keeps its input and a number per row."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "rms_norm":
            return func(*args, **(kwargs or {}))
        return _FusedNorm.apply(args[0], *(each for each in args[1:] if isinstance(each, Tensor)))


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)


class Products(TorchFunctionMode):
    """Counts multiplications of linear layers, and what of them widens its input."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.widening = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") == "linear":
            count = output.numel() * args[0].shape[-1]
            self.all += count
            self.widening += count if output.shape[-1] > args[0].shape[-1] else 0
        return output


def family_at(name: str, folder: Path) -> tuple[ModelFamily, list[PromptEmbeds]]:
    """A family without weights, and one prompt."""
    spec = get_spec(name)
    shape = shape_of(spec, spec.default_flavour)
    assert shape is not None
    write_model(spec, shape, folder)
    family = get_family_class(spec)(spec, ModelSource(str(folder)), META, torch.bfloat16)
    return family, [embeds_of(shape)]


def attach_ours(denoiser: nn.Module, family: ModelFamily, adapter: str, paths: Sequence[str]) -> None:
    with META:
        if adapter == "lokr":
            preset = {"target_name": list(paths), "use_fnmatch": True}
            lycoris = {"algo": "lokr", "linear_dim": 10000, "factor": FACTOR, "apply_preset": preset}
            attach_lycoris(denoiser, lycoris, family.spec, torch.bfloat16, seed=0)
        else:
            settings = LoraSettings(rank=RANK, use_dora=adapter == "dora")
            attach_lora(denoiser, settings, family.spec, torch.bfloat16, seed=0)


def attach_published(denoiser: nn.Module, adapter: str, paths: Sequence[str]) -> None:
    from peft import LoKrConfig, LoraConfig, inject_adapter_in_model

    targets = list(paths)
    lokr = {"r": 100000, "decompose_factor": FACTOR, "target_modules": targets}
    lora = {"r": RANK, "use_dora": adapter == "dora", "target_modules": targets}
    with META:
        inject_adapter_in_model(LoKrConfig(**lokr) if adapter == "lokr" else LoraConfig(**lora), denoiser)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def kept_bytes(name: str, adapter: str, is_ours: bool, lowest: bool, norms: AbstractContextManager[Any]) -> int:
    if name == "omnigen" and not is_ours and adapter != "dora":
        return omnigen_bytes(adapter, norms)
    as_it_is = patch("simpletuner.models.family.reduce_activation_memory", lambda denoiser, *classes: denoiser)
    with tempfile.TemporaryDirectory() as folder:
        family, embeds = family_at(name, Path(folder) / "model")
        with nullcontext() if is_ours else as_it_is:
            denoiser = family.empty_denoiser()
        paths, _ = lora_layers(denoiser, ("default",), family.spec)
        if is_ours:
            set_activation_memory(denoiser, "lowest" if lowest else "low")
            attach_ours(denoiser, family, adapter, paths)
        else:
            attach_published(denoiser, adapter, paths)
        with norms:
            kept = measure_activations(family, denoiser, 1024, 1024, embeds, has_backward=False)
    return kept.outside + sum(kept.inside)


def omnigen_bytes(adapter: str, norms: AbstractContextManager[Any]) -> int:
    """diffusers' own forward pass, which `family.predict` cannot call."""
    side = published("omnigen", adapter, False, META, 1024)
    counter = SavedBytes(side.denoiser, ())
    # Its angles ask for a value, and switch an autocast off that `meta` does not have.
    no_autocast = patch("torch.autocast", lambda **options: nullcontext())
    with norms, counter, FusedAttention(), Kernels(), no_autocast:
        side.losses()
    return sum(counter.saved.values())


def floor_gib(name: str, lowest: bool) -> float | None:
    """What blocks must keep at least without a product more, worked out by hand for the families that need it.

    Args:
        lowest: the projections into the MLPs are products that are made twice.
    """
    if name not in FLOORS:
        return None
    rows, of_the_mlp, hidden = FLOORS[name]
    return round(2 * (rows if lowest else rows + of_the_mlp) * hidden / GIB, 2)


def products_twice(name: str) -> float:
    """The share of the products of linear layers, forward and to the input, that `lowest` makes twice."""
    with tempfile.TemporaryDirectory() as folder:
        family, embeds = family_at(name, Path(folder) / "model")
        denoiser = family.empty_denoiser()
        with Products() as counted:
            measure_activations(family, denoiser, 1024, 1024, embeds, has_backward=False)
    return counted.widening / (2 * counted.all)


def row_of(name: str, adapter: str, lowest: bool, limit: float | None) -> dict[str, Any]:
    row: dict[str, Any] = {"family": name, "adapter": adapter}
    if limit is None:
        limit = LOWEST_LIMIT if lowest else UNET_LIMIT if name in UNETS else LIMIT
    for key in ("", "_norms_fused"):
        ours, theirs = (
            kept_bytes(name, adapter, is_ours, lowest, FusedNorms() if key else nullcontext())
            for is_ours in (True, False)
        )
        row |= {f"ours_gib{key}": round(ours / GIB, 2), f"published_gib{key}": round(theirs / GIB, 2)}
        row[f"ratio{key}"] = round(ours / theirs, 3)
    row["limit"] = limit
    if lowest:
        row["products"] = round(products_twice(name), 3)
    floor = floor_gib(name, lowest)
    is_near = floor is not None and row["ours_gib"] <= OF_THE_FLOOR * floor
    return row | {"floor_gib": floor, "met": row["ratio_norms_fused"] <= limit or is_near}


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", default=[*FAMILIES])
    parser.add_argument("--adapter", choices=("lora", "dora", "lokr"), default="lora")
    parser.add_argument("--lowest", action="store_true")
    parser.add_argument("--limit", type=float)
    arguments = parser.parse_args(words)
    rows = []
    for name in arguments.families:
        rows.append(row_of(name, arguments.adapter, arguments.lowest, arguments.limit))
        print(" | ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    print(json.dumps({"rows": rows}))
    return int(not all(row["met"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
