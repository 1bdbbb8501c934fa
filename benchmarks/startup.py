"""How long until the first step is done, and until `--help` answers.

Start of Python to the end of the first optimizer step of the shipped example with warm caches, over importing torch,
diffusers' OmniGen transformer and lycoris in a bare Python; medians of pairs run in turn. And seconds of
`simpletuner --help`.

    python benchmarks/startup.py

Goals: at most 2.0 times, and 0.35 s. The last line is one JSON object; exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RATIO_GOAL = 2.0
HELP_GOAL_SECONDS = 0.35
IMPORTS = "import torch; from diffusers import OmniGenTransformer2DModel; import lycoris"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="startup-"))
    try:
        seconds_to_first_step(folder)  # fills caches, compiles bytecode
        seconds_to_import(folder)
        pairs = [(seconds_to_first_step(folder), seconds_to_import(folder)) for _ in range(arguments.pairs)]
        helps = [seconds_of(["--help"], folder) for _ in range(2 * arguments.pairs)]
    finally:
        shutil.rmtree(folder)
    ratio = statistics.median(first / bare for first, bare in pairs)
    help_seconds = statistics.median(helps)
    figures = {
        "benchmark": "startup",
        "ratio": round(ratio, 3),
        "ratio_goal": RATIO_GOAL,
        "first_step_seconds": round(statistics.median(first for first, _ in pairs), 3),
        "import_seconds": round(statistics.median(bare for _, bare in pairs), 3),
        "help_seconds": round(help_seconds, 3),
        "help_goal_seconds": HELP_GOAL_SECONDS,
    }
    print(json.dumps(figures))
    return 0 if ratio <= RATIO_GOAL and help_seconds <= HELP_GOAL_SECONDS else 1


def seconds_to_first_step(folder: Path) -> float:
    """Train one step of the example again, no images, no eval loss; until its record is written."""
    shutil.rmtree(folder / "output", ignore_errors=True)
    started = time.time()
    seconds_of(
        [
            "train",
            "example=omnigen-tiny",
            "--max_train_steps=1",
            "--validation_disable=true",
            "--eval_loss_disable=true",
        ],
        folder,
    )
    metrics = folder / "output" / "omnigen-tiny" / "metrics.jsonl"
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    return next(record["time"] for record in records if record["event"] == "step_done") - started


def seconds_to_import(folder: Path) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", IMPORTS], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


def seconds_of(arguments: list[str], folder: Path) -> float:
    """Wall time of `simpletuner ARGUMENTS`."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "simpletuner", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        raise SystemExit(f"simpletuner {arguments} failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
