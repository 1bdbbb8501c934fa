"""How much of a VAE's speed `simpletuner cache build` reaches.

The same VAE encodes the same images four ways in one process, with the same number of threads and the same settings of
the allocator: as diffusers loads it, from ready tensors in batches and nothing else; as this program loads it, in the
layout that a CPU is fastest with, and nothing else (`bare`); by `cache build` from the folder to the shards (scan,
decoding, crops, digests, writing); and by a plain loop that opens, encodes and saves one image after the other into a
file each. Each round runs them all and gives one ratio of each pair; the median of the rounds counts, since the speed
of a shared machine changes from minute to minute. The last line is JSON; the exit code is 1 when `cache build` is below
`--goal` of the rate of diffusers, the independent one. `build_over_bare` is what everything around the VAE costs.

`thread_share` is `build_over_bare` in CPU time of the thread that encodes: what the rate comes to where the threads
that read and write have a core of their own, which a busy machine does not show in seconds. `process_share` is that of
all threads: what it comes to where they share one core. `decoding` is the CPU time of decoding each file once
and making a tensor of it, over that of the VAE: `process_share` cannot be above 1 / (1 + decoding), whatever the rest
costs. The scan before it compares the checksums of these files and decodes none of them.

    python benchmarks/caching.py
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from data_runs import write_model_folder, write_run
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor

# About the size of a preview autoencoder (0.5 million parameters): a large VAE would hide everything around it.
VAE = {
    "block_out_channels": (16, 32, 64, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "scaling_factor": 0.13025,
}
GOAL = 0.95
CLOCK, THREAD, PROCESS = range(3)  # of `seconds_of`


def write_images(folder: Path, count: int, side: int) -> None:
    """PNGs with soft shapes and some noise: neither flat nor random, so that decoding costs what photographs cost."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    for index in range(count):
        waves = [np.sin(rng.uniform(2, 12) * x + rng.uniform(2, 12) * y + rng.uniform(0, 6)) for _ in range(3)]
        values = 128 + 100 * np.stack(waves, axis=-1) + rng.normal(0, 4, (side, side, 3))
        Image.fromarray(values.clip(0, 255).astype(np.uint8)).save(folder / f"image {index}.png")


def write_model(folder: Path) -> None:
    """A model folder with a random VAE; the denoiser is never loaded, so that its configuration is enough."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    write_model_folder(folder)
    torch.manual_seed(0)
    AutoencoderKL(**VAE).save_pretrained(folder / "vae")


class Bench:
    """The ways over the images of `folder`."""

    def __init__(self, folder: Path, side: int, batch_size: int):
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        from simpletuner.config.loading import load_run
        from simpletuner.models.build import build_family

        self.folder, self.side, self.batch_size = folder, side, batch_size
        self.paths = sorted((folder / "images").iterdir())
        self.load = lambda *arguments: load_run(arguments, {}, folder)
        self.family = build_family(self.load().config)
        self.vae = self.family.load_vae()
        self.vae_of_diffusers = AutoencoderKL.from_pretrained(folder / "model" / "vae").eval().requires_grad_(False)
        self.pixels = [self.read(path) for path in self.paths]
        self.rounds = 0

    def read(self, path: Path) -> Tensor:
        """(1, 3, H, W) in [-1, 1]."""
        import torch

        with Image.open(path) as image:
            values = np.asarray(
                image.convert("RGB").resize((self.side, self.side), Image.Resampling.LANCZOS), np.float32
            )
        return torch.from_numpy(values / 127.5 - 1).permute(2, 0, 1)[None].contiguous()

    def batches(self) -> Iterator[Tensor]:
        import torch

        for start in range(0, len(self.pixels), self.batch_size):
            yield torch.cat(self.pixels[start : start + self.batch_size])

    def diffusers(self) -> None:
        import torch

        with torch.no_grad():
            for pixels in self.batches():
                posterior = self.vae_of_diffusers.encode(pixels).latent_dist
                _ = posterior.mean, posterior.std  # what is cached

    def bare(self) -> None:
        for pixels in self.batches():
            self.family.encode_images(self.vae, pixels)

    def build(self) -> None:
        from simpletuner.commands import cache

        self.rounds += 1
        with contextlib.redirect_stdout(io.StringIO()):
            cache.build(self.load(f"--cache_dir=cache{self.rounds}"))

    def decode(self) -> None:
        for path in self.paths:
            self.read(path)

    def plain(self) -> None:
        from safetensors.torch import save_file

        target = self.folder / "plain"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir()
        for path in self.paths:
            [moments] = self.family.encode_images(self.vae, self.read(path))
            assert moments.std is not None
            save_file({"mean": moments.mean, "std": moments.std}, target / f"{path.stem}.safetensors")


def seconds_of(work: Callable[[], None]) -> tuple[float, float, float]:
    """(seconds by the clock, CPU seconds of this thread, of all threads)."""
    clocks = (time.perf_counter, time.thread_time, time.process_time)
    started = [clock() for clock in clocks]
    work()
    clock, thread, process = (now() - then for now, then in zip(clocks, started, strict=True))
    return clock, thread, process


def measure(arguments: argparse.Namespace) -> dict[str, object]:
    import torch

    from simpletuner.allocation import keep_freed_memory

    keep_freed_memory()  # as the program does at its start
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory(prefix="caching-") as name:
        folder = Path(name)
        write_images(folder / "images", arguments.images, arguments.source_side)
        write_model(folder / "model")
        write_run(folder, arguments.side, vae_batch_size=arguments.batch)
        bench = Bench(folder, arguments.side, arguments.batch)
        seconds: dict[str, list[tuple[float, float, float]]] = {
            way: [] for way in ("bare", "diffusers", "build", "plain", "decode")
        }
        for way in seconds:
            getattr(bench, way)()  # imports and warms up
        for _ in range(arguments.rounds):
            for way, times in seconds.items():
                times.append(seconds_of(getattr(bench, way)))

    def ratio(one: str, other: str, clock: int = CLOCK) -> float:
        return statistics.median(a[clock] / b[clock] for a, b in zip(seconds[one], seconds[other], strict=True))

    rates = {way: arguments.images / statistics.median(each[CLOCK] for each in times) for way, times in seconds.items()}
    share = ratio("diffusers", "build")
    return {
        "images": arguments.images,
        "side": arguments.side,
        "source_side": arguments.source_side,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "bare_per_second": round(rates["bare"], 1),
        "diffusers_per_second": round(rates["diffusers"], 1),
        "build_per_second": round(rates["build"], 1),
        "plain_per_second": round(rates["plain"], 1),
        "build_over_diffusers": round(share, 3),
        "build_over_bare": round(ratio("bare", "build"), 3),
        "build_over_plain": round(ratio("plain", "build"), 3),
        "thread_share": round(ratio("bare", "build", THREAD), 3),
        "process_share": round(ratio("bare", "build", PROCESS), 3),
        "decoding": round(ratio("decode", "bare", PROCESS), 3),
        "goal": arguments.goal,
        "goal_reached": share >= arguments.goal,
    }


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--side", type=int, default=128, help="of the training images, pixels")
    parser.add_argument("--source-side", type=int, default=128, help="of the files, pixels")
    parser.add_argument("--batch", type=int, default=1, help="more than 1 pays on accelerators only")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--goal", type=float, default=GOAL)
    figures = measure(parser.parse_args(words))
    print(json.dumps(figures))
    return 0 if figures["goal_reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
