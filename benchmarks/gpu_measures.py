"""The twelve measurements of the first day with a GPU, each a function that returns what it found.

They answer, in this order: does it run; what does a step cost; where does its time go; does it wait; are the ways of
saving memory right there; what do swapping, `auto`, determinism, number formats, masks and the VAE cost.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_rows import ROWS, Setting, measure, now, step_of
from torch import nn

from simpletuner.precision.mixed import exact_float32, use_tf32
from simpletuner.training.gradient_checkpointing import GradientCheckpointing

Measure = Callable[[Setting], dict[str, Any]]


def command(*words: str, lines: int = 6, timeout: float = 240) -> dict[str, Any]:
    """What a verb of the program says at its end, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-m", "simpletuner", *words],
            cwd=folder, capture_output=True, text=True, check=False, timeout=timeout, env=dict(os.environ),
        )  # fmt: skip
    said = (result.stdout + result.stderr).strip().splitlines()
    return {"exit": result.returncode, "seconds": round(time.monotonic() - started, 1), "said": said[-lines:]}


def example(setting: Setting, *words: str) -> dict[str, Any]:
    """The shipped example, short, on this device."""
    steps = ["--max_train_steps=6", "--validation_disable=true", "--eval_loss_disable=true", "--report_to=none"]
    return command("train", "example=omnigen-tiny", *steps, "--output_dir=output", *words)


def first(setting: Setting) -> dict[str, Any]:
    """1. Driver, libraries, and a tiny LoKr run."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30).stdout.split("\n")
    except OSError as error:
        driver = [str(error)]
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}
    return {"driver": driver[:1], **versions, "doctor": command("doctor", lines=30), "run": example(setting)}


def rows(names: Sequence[str], setting: Setting, **changes: Any) -> dict[str, Any]:
    """Some of the full-size rows in this process, one after the other."""
    found = {}
    for name in names:
        try:
            found[name] = measure(replace(ROWS[name], **changes), setting)
        except (RuntimeError, MemoryError) as error:
            found[name] = {"error": str(error).splitlines()[0]}
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def profile(pixels: int, setting: Setting) -> dict[str, Any]:
    """3. One step: kernels, how long the GPU works, how long the host issues, how long the step takes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    step = step_of(ROWS["plain"], replace(setting, pixels=pixels if setting.is_full else setting.pixels))
    for number in range(3):
        step.take(number)
    now(setting.device)
    started = time.perf_counter()
    step.take(3)
    issued = time.perf_counter() - started
    now(setting.device)
    whole = time.perf_counter() - started
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (setting.device.type == "cuda")]
    with profiler(activities=activities) as found:
        step.take(4)
        now(setting.device)
    kernels = [event for event in found.events() if event.device_type.name == "CUDA"]
    busy = sum(event.self_device_time_total for event in kernels) / 1e6
    top = sorted(found.key_averages(), key=lambda event: -event.self_device_time_total)[:12]
    return {
        "seconds": round(whole, 4),
        "host_seconds": round(issued, 4),
        "kernels": len(kernels),
        "gpu_seconds": round(busy, 4),
        "idle_share": round(max(1 - busy / whole, 0), 3),
        "most": {event.key[:80]: round(event.self_device_time_total / 1e6, 5) for event in top},
    }


def waits(setting: Setting) -> dict[str, Any]:
    """4. Where the host waits for the device in three steps."""
    step = step_of(ROWS["plain"], setting)
    step.take(0)
    with warnings.catch_warnings(record=True) as reported:
        warnings.simplefilter("always")
        if setting.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        for number in (1, 2, 3):
            step.take(number)
        if setting.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in reported if "synchroniz" in str(each.message)]
    return {"waits_in_three_steps": len(places), "places": sorted(set(places))}


def offloaded_dropout(setting: Setting) -> dict[str, Any]:
    """5. Gradients of inputs in main memory against plain checkpointing, with dropout."""
    device, found = setting.device, []
    for offloads in (False, True):
        torch.manual_seed(0)
        layers = (nn.Sequential(nn.Linear(256, 256), nn.Dropout(0.5), nn.Linear(256, 256)) for _ in range(6))
        blocks = nn.Sequential(*layers).to(device)
        recomputing = GradientCheckpointing(device, offloads_inputs=offloads)
        for _ in range(2):
            blocks.zero_grad()
            torch.manual_seed(1)
            x = torch.ones(2, 64, 256, device=device, requires_grad=True)
            for block in blocks:
                x = recomputing(block, x)
            x.square().sum().backward()
        found.append([each.grad.cpu() for each in blocks.parameters()])
    return {"equal": all(a.equal(b) for a, b in zip(*found, strict=True))}


def determinism(setting: Setting) -> dict[str, Any]:
    """8. Resumed runs: as they are, with own products, deterministic; and what the option costs."""
    words = ["verify-resume", "example=omnigen-tiny", "--steps=9"]
    return {
        "plain": command(*words),
        "deterministic": command(*words, "--deterministic=true"),
        "cost": rows(["plain", "plain deterministic", "recomputed", "recomputed deterministic"], setting),
    }


def proofs(setting: Setting) -> dict[str, Any]:
    """9. Files of adapters in float32 and bf16 read back on the CPU."""
    return {precision: example(setting, f"--mixed_precision={precision}") for precision in ("no", "bf16")}


def masks(setting: Setting) -> dict[str, Any]:
    """11. Attention of a padded batch of four: one call with a mask against a call for each row without."""
    device, (tokens, image) = setting.device, (4400, 4096) if setting.is_full else (48, 32)
    shape = (4, 32, tokens, 96) if setting.is_full else (4, 2, tokens, 8)
    query, key, value = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    padding = [0, 40, 90, 200] if setting.is_full else [0, 1, 2, 3]
    mask = torch.zeros(4, 1, 1, tokens, device=device, dtype=torch.bfloat16)
    for row, count in enumerate(padding):
        mask[row, ..., :count] = -torch.inf
    attention = nn.functional.scaled_dot_product_attention
    asking = query[:, :, -image:]

    def masked() -> torch.Tensor:
        return attention(asking, key, value, attn_mask=mask)

    def by_row() -> torch.Tensor:
        parts = [
            attention(asking[row : row + 1], key[row : row + 1, :, count:], value[row : row + 1, :, count:])
            for row, count in enumerate(padding)
        ]
        return torch.cat(parts)

    found: dict[str, Any] = {"largest_difference": float((masked() - by_row()).detach().abs().max())}
    for name, way in (("masked", masked), ("by_row", by_row)):
        for _ in range(3):
            way().sum().backward()
        started = now(device)
        for _ in range(10):
            way().sum().backward()
        found[f"{name}_ms"] = round(100 * (now(device) - started), 3)
    return found


def compiled_sizes(setting: Setting) -> dict[str, Any]:
    """11. Compiled blocks over sizes: seconds of the first step of each, and what was compiled."""
    from torch._dynamo.utils import counters

    sizes = (1024, 896, 768, 640, 512) if setting.is_full else (64, 96, 128)
    row, seconds = ROWS["compiled"] if setting.is_full else replace(ROWS["compiled"], backend="aot_eager"), {}
    step = step_of(row, setting)
    for pixels in sizes:
        batch = step.batch_of(pixels)
        started = now(setting.device)
        step.take(0, batch)
        seconds[pixels] = round(now(setting.device) - started, 2)
    return {"first_step_seconds": seconds, "graphs": counters["stats"].get("unique_graphs", 0)}


def vae(setting: Setting) -> dict[str, Any]:
    """12. The VAE of SDXL and OmniGen at 1024 px: TF32 against exact float32."""
    from diffusers import AutoencoderKL

    widths = (128, 256, 512, 512) if setting.is_full else (8, 8, 8, 8)
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
        norm_num_groups=32 if setting.is_full else 4,
    ).to(setting.device)  # fmt: skip
    pixels = torch.rand(1, 3, setting.pixels, setting.pixels, device=setting.device) * 2 - 1
    means, found = [], {}
    for name in ("tf32", "exact"):
        use_tf32(name == "tf32")
        with torch.no_grad():
            for _ in range(2):
                started = now(setting.device)
                mean = model.encode(pixels).latent_dist.mean
                found[f"{name}_seconds"] = round(now(setting.device) - started, 4)
        means.append(mean.cpu())
    with exact_float32():
        difference = float((means[0] - means[1]).abs().max() / means[1].abs().max())
    return found | {"largest_relative_difference": difference}


MEASURES: Mapping[str, Measure] = {
    "1 driver, libraries, a tiny run": first,
    "2 plain and recomputed": partial(rows, ["plain", "recomputed"]),
    "3 profile at 1024 px": partial(profile, 1024),
    "3 profile at 512 px": partial(profile, 512),
    "4 waits": waits,
    "5 parked inputs with dropout": offloaded_dropout,
    "6 all blocks swapped": partial(rows, ["all blocks swapped"]),
    "7 recomputed to fit, then all weights by measure": partial(
        rows, ["recomputed to fit 15.5 GiB", "all weights by measure"]
    ),
    "8 resumed bits": determinism,
    "9 proofs of files": proofs,
    "10 number formats": partial(
        rows, ["plain", "int8", "int8 recomputed", "fp8 recomputed", "nf4 recomputed", "int4 recomputed"]
    ),
    "11 a padded batch": masks,
    "11 compiled sizes": compiled_sizes,
    "12 the VAE": vae,
}
