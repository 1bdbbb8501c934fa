"""Whether a training step takes as much memory as `simpletuner plan` says.

A model of 26 million parameters trains for three steps in a process of its own, once for each way: everything kept,
blocks recomputed, the base in 8 bits, blocks swapped. Before a step the kernel's mark of the process's peak (`VmHWM`)
is reset; what the step takes is that peak over what the process holds with the model loaded. The first step reads the
weights from their file, which is mapped, and makes the state of the optimizer; the larger of the others counts. The
last line is JSON; the exit code is 1 where a peak is off by more than `--limit`.

glibc gives pieces of up to 32 MB that were freed back late, or never where the heap has gaps: with this model 270 MB
more than all tensors take. With `memory` set a run on the CPU asks for pieces of 1 MB and more to be given back
at once (`give_back_at_once`), and so does this measurement.

    python benchmarks/peak_against_plan.py [--only WAY] [--limit 0.1]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIDE = 384
STEPS = 3
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain": {"gradient_checkpointing": False},
    "checkpointed": {"gradient_checkpointing": True},
    "int8": {"gradient_checkpointing": True, "base_model_precision": "int8-quanto"},
    "swapped": {"gradient_checkpointing": True, "enable_group_offload": True},
}
# Rows of a plan that are there while the step runs and not before it.
OF_THE_STEP = ("gradients", "activations", "one unpacked matrix", "a step of")
SHAPE = {
    "hidden_size": 512,
    "num_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "intermediate_size": 1408,
    "vocab_size": 608,
    "pos_embed_max_size": 32,
    "pad_token_id": 2,
    "time_step_dim": 256,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 32, "long_factor": [1.0] * 32},
}


def write_model(folder: Path) -> None:
    """The shipped tiny OmniGen with a larger transformer of random weights."""
    import torch
    from diffusers.models.transformers.transformer_omnigen import OmniGenTransformer2DModel

    from simpletuner.examples import example_dir

    shutil.copytree(example_dir("omnigen-tiny") / "model", folder, ignore=shutil.ignore_patterns("transformer"))
    torch.manual_seed(0)
    OmniGenTransformer2DModel(**SHAPE).save_pretrained(folder / "transformer")


def write_run(folder: Path, model: Path, options: Mapping[str, Any]) -> None:
    """Two images of one size, and a LoRA of rank 16 in float32."""
    import numpy as np
    from PIL import Image

    images = folder / "images"
    images.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for index in range(2):
        pixels = draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{index}.png")
        (images / f"{index}.txt").write_text("a red fox with a green scarf sits on a stone wall in the rain\n")
    config = {
        "model_family": "omnigen",
        "pretrained_model_name_or_path": str(model),
        "model_type": "lora",
        "lora_type": "standard",
        "lora_rank": 16,
        "optimizer": "adamw",
        "mixed_precision": "no",
        "resolution": SIDE,
        "train_batch_size": 2,
        "max_train_steps": STEPS,
        "validation_disable": True,
        "checkpoint_step_interval": 0,
        "data_backend_config": "data.json",
        "output_dir": "output",
        "cache_dir": "cache",
        **options,
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "data.json").write_text(json.dumps([{"id": "images", "instance_data_dir": "images"}]))


def planned(folder: Path) -> int:
    """Bytes of the rows of the plan that a step adds to the loaded model."""
    from simpletuner.commands.plan import make_plan
    from simpletuner.config.loading import load_run

    found = make_plan(load_run([], {}, folder), probe=False)
    return sum(row.num_bytes for row in found.memory if row.name.startswith(OF_THE_STEP))


def status(key: str) -> int:
    """Bytes of a line of this process's status: `VmRSS`, `VmHWM`."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, key
    return int(found[1]) * 1024


def train_measured(folder: Path) -> None:
    """Print how much each step of the run takes over what was held before it, as JSON."""
    import ctypes

    from simpletuner.allocation import give_back_at_once
    from simpletuner.config.loading import load_run
    from simpletuner.training import loop, trainer

    give_back_at_once()
    libc, step, taken = ctypes.CDLL(None), loop.train_window, []

    def measured(*given: Any) -> Any:
        libc.malloc_trim(0)  # what is free goes back to the system and is not counted as held
        before = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        outcome = step(*given)
        taken.append(status("VmHWM") - before)
        return outcome

    loop.train_window = measured
    trainer.train(load_run([], {}, folder))
    print(json.dumps(taken))


def measured(folder: Path) -> list[int]:
    """As `train_measured`, in a process of its own."""
    words = [sys.executable, __file__, "--train", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stdout[-4000:] + done.stderr[-4000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=WAYS, action="append")
    parser.add_argument("--limit", type=float, default=0.1)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(words)
    if arguments.train is not None:
        train_measured(arguments.train)
        return 0
    rows = {}
    with tempfile.TemporaryDirectory() as place:
        write_model(Path(place) / "model")
        for name in arguments.only or WAYS:
            folder = Path(place) / name
            write_run(folder, Path(place) / "model", WAYS[name])
            first, *others = measured(folder)
            expected = planned(folder)
            off = max(others) / expected - 1
            rows[name] = {"planned": expected, "measured": max(others), "first_step": first, "off": round(off, 4)}
            mib = [f"{size / 2**20:.1f}" for size in (expected, max(others), first)]
            print(f"{name:13} planned {mib[0]} MiB, measured {mib[1]} MiB ({off:+.1%}), first step {mib[2]} MiB")
    fits = all(abs(row["off"]) <= arguments.limit for row in rows.values())
    print(json.dumps({"ways": rows, "limit": arguments.limit, "holds": fits}))
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
