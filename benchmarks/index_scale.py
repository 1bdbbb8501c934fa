"""How the index of images behaves from ten thousand files to a million: scan, warm start, memory, sampler.

Makes folders of small images below a temporary folder, indexes them, fills their cache of latents, and starts again
on the unchanged folder. A warm start is a new process that goes from nothing to the latents of the first batch; it is
compared with a bare walk, a new process too, that lists the same folders and asks for the status of each file and does
nothing else. The interpreter and imports are left out of both. Everything is removed at the end. The last line is JSON;
the exit code is 1 where a goal is missed:

- warm start at most 1.5 times the bare walk, at the largest size
- memory of the warm start below 1 GB
- seconds per file of the first scan, and seconds per step of the sampler, do not grow by more than half with the size

    python benchmarks/index_scale.py                     # to a million files: minutes, and 5 GB on the disk
    python benchmarks/index_scale.py --files 10000 100000
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from data_runs import write_model_folder, write_run

if TYPE_CHECKING:
    from simpletuner.cache.latents import LatentCache
    from simpletuner.data.dataset import Dataset

FILES = (10_000, 100_000, 1_000_000)
FILES_PER_FOLDER = 1000
LARGEST_START = 1.5
LARGEST_MEMORY = 1e9
LARGEST_GROWTH = 1.5
STARTS = 3
STEPS = 2000


def make_images(root: Path, count: int) -> None:
    """`count` different images of 8x8 pixels; one kind of file, a number in its pixels."""
    from PIL import Image

    for start in range(0, count, FILES_PER_FOLDER):
        folder = root / f"{start // FILES_PER_FOLDER:04d}"
        folder.mkdir(parents=True)
        for number in range(start, min(start + FILES_PER_FOLDER, count)):
            buffer = io.BytesIO()
            Image.frombytes("RGB", (8, 8), number.to_bytes(192, "big")).save(buffer, "PPM")
            (folder / f"an image {number}.ppm").write_bytes(buffer.getvalue())


def walk(root: Path) -> dict[str, float]:
    """List every folder and ask for the status of every file."""
    used, started = time.process_time(), time.perf_counter()
    pending, total = [os.fspath(root)], 0
    while pending:
        with os.scandir(pending.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                else:
                    total += entry.stat().st_size
    return {"seconds": time.perf_counter() - started, "processor": time.process_time() - used}


def start(root: Path, work_dir: Path) -> dict[str, float]:
    """From nothing to the latents of the first batch, and then some steps of the sampler."""
    from types import SimpleNamespace

    from simpletuner.cache.latents import LatentCache
    from simpletuner.cache.store import TensorStore
    from simpletuner.config.loading import load_run
    from simpletuner.data.datasets import build_datasets
    from simpletuner.data.sampler import Sampler
    from simpletuner.families.registry import get_spec
    from simpletuner.training.latents import set_fingerprint
    from simpletuner.training.memory import peak_bytes

    loaded = load_run((), {}, root.parent)
    used, started = time.process_time(), time.perf_counter()
    spec = get_spec("omnigen")
    [dataset] = build_datasets(loaded.datasets, loaded.config, spec, work_dir)
    cache = LatentCache(TensorStore(work_dir / "latents"), SimpleNamespace(spec=spec), "a VAE")
    is_complete = cache.store.complete(set_fingerprint(dataset, dataset.id, cache)) is not None
    sampler = Sampler([dataset], 4, 0)
    batch = [dataset.samples[index] for index in sampler.batch(0, 0).sample_indices]
    if is_complete:
        [cache.get(sample) for sample in batch]
    seconds = time.perf_counter() - started
    processor = time.process_time() - used

    if not is_complete:
        write_latents(dataset, cache)
    stepping = time.process_time()
    for position in range(1, STEPS):
        [dataset.samples[index] for index in sampler.batch(0, position % (len(dataset.samples) // 4)).sample_indices]
    return {
        "seconds": seconds,
        "processor": processor,
        "step": (time.process_time() - stepping) / STEPS,
        "memory": peak_bytes(),
        "images": len(dataset.samples),
        "is_complete": is_complete,
    }


def write_latents(dataset: Dataset, cache: LatentCache) -> None:
    """Fill the cache as a run would, but with tensors of one number: how large they are costs a start nothing."""
    import torch

    from simpletuner.cache.store import StoreWriter
    from simpletuner.training.latents import set_fingerprint

    moments = {"mean": torch.zeros(1), "std": torch.zeros(1)}
    with StoreWriter(cache.store) as writer:
        for sample in dataset.samples:
            writer.put(cache.key(sample), moments)
    cache.store.note_complete(set_fingerprint(dataset, dataset.id, cache), len(dataset.samples))


def in_new_process(way: str, folder: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


def measure_size(folder: Path, count: int) -> dict[str, float]:
    """Everything at one size. Clock times are the best of some rounds that alternate."""
    folder.mkdir()
    write_model_folder(folder / "model")
    write_run(folder, 64)
    make_images(folder / "images", count)
    first = in_new_process("start", folder)
    assert first["images"] == count
    assert not first["is_complete"]
    walks, starts = [], []
    for _ in range(STARTS):
        walks.append(in_new_process("walk", folder))
        starts.append(in_new_process("start", folder))
        assert starts[-1]["is_complete"]
    walked, warm = (min(each["seconds"] for each in times) for times in (walks, starts))
    walked_cpu, warm_cpu = (min(each["processor"] for each in times) for times in (walks, starts))
    return {
        "files": count,
        "scan_seconds": round(first["seconds"], 2),
        "scan_microseconds_per_file": round(first["processor"] / count * 1e6, 1),
        "walk_seconds": round(walked, 4),
        "warm_start_seconds": round(warm, 4),
        "warm_start_over_walk": round(warm / walked, 3),
        "warm_start_over_walk_in_processor_time": round(warm_cpu / walked_cpu, 3),
        "memory_gb": round(max(each["memory"] for each in starts) / 1e9, 3),
        "sampler_microseconds_per_step": round(min(each["step"] for each in starts) * 1e6, 1),
    }


def judge(sizes: list[dict[str, float]]) -> dict[str, bool]:
    first, last = sizes[0], sizes[-1]

    def is_flat(name: str) -> bool:
        return last[name] <= LARGEST_GROWTH * first[name]

    return {
        "warm_start": last["warm_start_over_walk"] <= LARGEST_START,
        "memory": last["memory_gb"] * 1e9 <= LARGEST_MEMORY,
        "scan_is_flat": is_flat("scan_microseconds_per_file"),
        "sampler_is_flat": is_flat("sampler_microseconds_per_step"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, nargs="+", default=list(FILES), help="sizes, ascending")
    parser.add_argument("--under", type=Path, help="where the temporary folder is made")
    parser.add_argument("--way", choices=("walk", "start"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way == "walk":
        print(json.dumps(walk(arguments.folder / "images")))
        return 0
    if arguments.way == "start":
        print(json.dumps(start(arguments.folder / "images", arguments.folder / "work")))
        return 0
    sizes = []
    for count in arguments.files:
        with tempfile.TemporaryDirectory(prefix="index-scale-", dir=arguments.under) as name:
            sizes.append(measure_size(Path(name) / "run", count))
        print(json.dumps(sizes[-1]), flush=True)
    goals = judge(sizes)
    print(json.dumps({"sizes": sizes, "goals": goals, "goal_reached": all(goals.values())}))
    return 0 if all(goals.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
