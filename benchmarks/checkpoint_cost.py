"""What it costs to commit a checkpoint, how long training waits for it, and how long a resume reads it.

A committed save (files, fsync, sha256, manifest, rename) over a plain save plus a bare fsync plus a bare sha256 of the
same tensors; medians of pairs run in turn, for files of 12, 100 and 400 MB. The pause is the committed save over the
time between two checkpoints at the default `checkpoint_step_interval` and `--step-seconds`. A resume verifies every
sha256 and reads the tensors: that is what it takes longer than a fresh start.

    python benchmarks/checkpoint_cost.py --folder DISK

Goals: at most 1.2 times, 1 %, 5 s. The last line is one JSON object; exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from simpletuner import storage
from simpletuner.config.options import all_options

RATIO_GOAL = 1.2
PAUSE_GOAL = 0.01
RESUME_GOAL_SECONDS = 5.0
FILE = "weights.safetensors"
MEGABYTES = (12, 100, 400)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--step-seconds", type=float, default=1.0, help="of the step that the pause is compared with")
    parser.add_argument("--folder", type=Path, help="on the disk to measure")
    arguments = parser.parse_args()
    interval = int(all_options()["checkpoint_step_interval"].default)
    between = interval * arguments.step_seconds
    rows = [measure(megabytes, arguments.pairs, between, arguments.folder) for megabytes in MEGABYTES]
    goals = {"ratio": RATIO_GOAL, "pause_share": PAUSE_GOAL, "resume_seconds": RESUME_GOAL_SECONDS}
    print(json.dumps({"benchmark": "checkpoint_cost", "goals": goals, "rows": rows}))
    return 0 if all(row[name] <= goal for row in rows for name, goal in goals.items()) else 1


def measure(megabytes: int, pairs: int, seconds_between: float, disk: Path | None) -> dict[str, float]:
    """One row: medians of pairs of a committed and a bare save."""
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-cost-", dir=disk))
    try:
        tensors = tensors_of(megabytes)
        times = [(committed(folder, tensors), bare(folder, tensors)) for _ in range(pairs)]
        reading = seconds(lambda: read(folder / "checkpoint"))
    finally:
        shutil.rmtree(folder)
    pause = statistics.median(one for one, _ in times)
    row = {
        "megabytes": megabytes,
        "ratio": round(statistics.median(one / other for one, other in times), 3),
        "seconds": round(pause, 3),
        "pause_share": round(pause / seconds_between, 5),
        "resume_seconds": round(reading, 3),
    }
    print(row, flush=True)
    return row


def tensors_of(megabytes: int) -> dict[str, torch.Tensor]:
    """Random numbers, so that no disk compresses them away: 64 tensors as in an adapter."""
    numbers = megabytes * 1_000_000 // 4 // 64
    return {f"blocks.{index}.weight": torch.rand(numbers) for index in range(64)}


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def committed(folder: Path, tensors: dict[str, torch.Tensor]) -> float:
    """Seconds of a checkpoint as the trainer writes it."""
    target = folder / "checkpoint"
    if target.exists():
        shutil.rmtree(target)
    os.sync()
    started = time.perf_counter()
    with storage.commit_dir(target, {"global_step": 1}) as temporary:
        storage.save_tensors(temporary / FILE, tensors, {"global_step": "1"})
        storage.write_json(temporary / "training_state.json", {"state": 1})
    return time.perf_counter() - started


def bare(folder: Path, tensors: dict[str, torch.Tensor]) -> float:
    """Seconds of a plain save, an fsync and a sha256, added."""
    path = folder / FILE
    path.unlink(missing_ok=True)
    os.sync()
    saved = seconds(lambda: save_file(tensors, path))
    with path.open("rb") as file:
        synced = seconds(lambda: os.fsync(file.fileno()))
        hashed = seconds(lambda: hashlib.file_digest(file, "sha256"))
    path.unlink()
    return saved + synced + hashed


def read(checkpoint: Path) -> None:
    """What a resume does with a checkpoint before its first step."""
    problems = storage.verify_dir(checkpoint)
    assert not problems, problems
    load_file(checkpoint / FILE)


if __name__ == "__main__":
    sys.exit(main())
