"""What each kind of adapter costs and weighs on the shipped tiny OmniGen: attention and MLP of every block, batch 8.

Forward and backward of the denoiser with the adapter, over the same denoiser frozen (gradient to the latents in every
case), in rounds within one process, so that a busy machine slows all of them alike. The model is tiny: its layers are
256 wide, so that ratios are larger than on the real one, and their order is what they tell. The last line is JSON.

    python benchmarks/adapter_cost.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner.adapters.base import Adapter
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.batch import Batch
from simpletuner.examples import example_dir
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily

BATCH, SIDE = 8, 16
GROUPS = ("attention", "feed-forward")
LYCORIS: dict[str, dict[str, Any]] = {
    "lokr, factor 16": {"algo": "lokr", "linear_dim": 10000, "factor": 16},
    "lokr, factor 4": {"algo": "lokr", "linear_dim": 10000, "factor": 4},
    "loha, rank 8": {"algo": "loha", "linear_dim": 8, "linear_alpha": 8},
    "locon, rank 16": {"algo": "locon", "linear_dim": 16, "linear_alpha": 16},
    "locon, rank 16, dora_wd": {"algo": "locon", "linear_dim": 16, "linear_alpha": 16, "dora_wd": True},
    "glora, rank 8": {"algo": "glora", "linear_dim": 8, "linear_alpha": 8},
    "dylora, rank 16": {"algo": "dylora", "linear_dim": 16, "linear_alpha": 16},
    "diag-oft, 4": {"algo": "diag-oft", "linear_dim": 4},
    "ia3": {"algo": "ia3"},
    "full": {"algo": "full"},
}
STANDARD = {
    "standard LoRA, rank 16": LoraSettings(rank=16, targets=GROUPS),
    "standard LoRA, rank 16, use_dora": LoraSettings(rank=16, targets=GROUPS, use_dora=True),
    "standard LoRA, rank 16, pissa": LoraSettings(rank=16, targets=GROUPS, init="pissa"),
}


def build(family: ModelFamily, name: str) -> tuple[nn.Module, Adapter | None]:
    """The denoiser with one adapter, or frozen and alone."""
    denoiser = family.load_denoiser().train()
    if name in STANDARD:
        return denoiser, attach_lora(denoiser, STANDARD[name], family.spec, torch.float32, 0)
    if name in LYCORIS:
        lycoris = LYCORIS[name] | {"preset": "attn-mlp"}
        return denoiser, attach_lycoris(denoiser, lycoris, family.spec, torch.float32, 0)
    return denoiser, None


def seconds_of(family: ModelFamily, denoiser: nn.Module, latents: torch.Tensor, conditioning: Any) -> float:
    started = time.perf_counter()
    inputs = latents.clone().requires_grad_()
    output = family.predict(denoiser, inputs, torch.full((BATCH,), 0.5), conditioning)
    output.square().mean().backward()
    return time.perf_counter() - started


def size_of(adapter: Adapter) -> tuple[int, int]:
    """(trained parameters, bytes of the file)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / adapter.file_name
        adapter.save(path, {})
        return sum(p.numel() for p in adapter.trainable_parameters().values()), path.stat().st_size


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    spec = get_spec("omnigen")
    source = ModelSource(str(example_dir("omnigen-tiny") / "model"))
    family = get_family_class(spec)(spec, source, torch.device("cpu"), torch.float32)
    torch.manual_seed(0)
    latents = torch.randn(BATCH, spec.latent_channels, SIDE, SIDE)
    embeds = family.encode_prompts(["a red star on a white background"] * BATCH)
    batch = Batch(latents, embeds, list(range(BATCH)), [""] * BATCH, torch.ones(BATCH), "benchmark")
    conditioning = family.collate(batch)

    cases = {name: build(family, name) for name in ("frozen", *STANDARD, *LYCORIS)}
    for denoiser, _ in cases.values():
        seconds_of(family, denoiser, latents, conditioning)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (denoiser, _) in cases.items():
            seconds[name].append(seconds_of(family, denoiser, latents, conditioning))
    rows = {}
    for name, (_, adapter) in cases.items():
        if adapter is not None:
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds["frozen"], strict=True))
            parameters, file_bytes = size_of(adapter)
            rows[name] = {"over_frozen": round(ratio, 2), "parameters": parameters, "file_bytes": file_bytes}
            print(f"{name:34} {ratio:5.2f} of frozen  {parameters:9,} parameters  {file_bytes / 1024:8.0f} KiB")
    print(json.dumps({"rows": rows, "threads": torch.get_num_threads(), "torch": torch.__version__}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
