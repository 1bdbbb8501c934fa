"""What a step of `simpletuner train` costs over a bare training loop: ratio of seconds per step, median of pairs.

Both sides train the same LoKr on the same random OmniGen (4 to 5 million parameters, 128 px, batch 4, bfloat16) with
the same clip and optimizer, EMA off. The bare loop is forward, backward, clip and step on tensors that lie in memory;
the trainer reads its cache, draws noise, tokenizes captions, reports. They run in turn, each in a process of its own.

    python benchmarks/step_overhead.py

Goal: at most 1.05. The last line is one JSON object; exit code 1 when the goal is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GOAL = 1.05
BATCH_SIZE = 4
SIDE = 128
LYCORIS = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=80, help="steps of each run; the first quarter is not counted")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of both sides")
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.bare:
        print(json.dumps(bare_loop(arguments.bare, arguments.steps)))
        return 0
    folder = Path(tempfile.mkdtemp(prefix="step-overhead-"))
    try:
        write_run(folder, arguments.steps)
        train(folder, arguments.threads)  # fills the caches
        pairs = [one_pair(folder, arguments.steps, arguments.threads) for _ in range(arguments.pairs)]
    finally:
        shutil.rmtree(folder)
    ratio = statistics.median(trained / bare for trained, bare in pairs)
    figures = {
        "benchmark": "step_overhead",
        "ratio": round(ratio, 4),
        "goal": GOAL,
        "trainer_seconds_per_step": round(statistics.median(trained for trained, _ in pairs), 5),
        "bare_seconds_per_step": round(statistics.median(bare for _, bare in pairs), 5),
        "pairs": [round(trained / bare, 4) for trained, bare in pairs],
        "threads": arguments.threads,
    }
    print(json.dumps(figures))
    return 0 if ratio <= GOAL else 1


def one_pair(folder: Path, steps: int, threads: int) -> tuple[float, float]:
    """(seconds per step of the trainer, of the bare loop)."""
    trained = train(folder, threads)
    bare = json.loads(run([sys.executable, __file__, "--bare", str(folder), "--steps", str(steps)], folder, threads))
    print(f"trainer {trained:.4f} s/step, bare {bare:.4f} s/step: {trained / bare:.4f}", flush=True)
    return trained, bare


def train(folder: Path, threads: int) -> float:
    """Run `simpletuner train` again; median seconds from one step's record to the next."""
    shutil.rmtree(folder / "output", ignore_errors=True)
    run([sys.executable, "-m", "simpletuner", "train"], folder, threads)
    records = [json.loads(line) for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()]
    times = [record["time"] for record in records if record["event"] == "step_done"]
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(seconds[len(seconds) // 4 :])


def run(command: list[str], folder: Path, threads: int) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{command} failed:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return result.stdout.strip().splitlines()[-1]


def bare_loop(folder: Path, steps: int) -> float:
    """Forward, backward, clip and step of the same model, adapter and optimizer on tensors in memory."""
    import torch

    from simpletuner.adapters.lycoris import attach_lycoris
    from simpletuner.batch import Batch
    from simpletuner.families.registry import get_family_class, get_spec
    from simpletuner.models.components import ModelSource
    from simpletuner.optim.adamw_bf16 import AdamWBF16

    spec = get_spec("omnigen")
    family = get_family_class(spec)(spec, ModelSource(str(folder / "model")), torch.device("cpu"), torch.bfloat16)
    denoiser = family.load_denoiser()
    attach_lycoris(denoiser, LYCORIS, spec, torch.bfloat16, seed=0)
    parameters = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
    optimizer = AdamWBF16(parameters, lr=1e-4)
    latents = torch.randn(BATCH_SIZE, 4, SIDE // 8, SIDE // 8)
    batch = Batch(
        latents=latents,
        prompt_embeds=family.encode_prompts([caption(index) for index in range(BATCH_SIZE)]),
        slots=range(BATCH_SIZE),
        digests=[""] * BATCH_SIZE,
        loss_weights=torch.ones(BATCH_SIZE),
        dataset_id="",
    )
    conditioning = family.collate(batch)
    sigmas, target = torch.full((BATCH_SIZE,), 0.5), torch.randn_like(latents)
    denoiser.train()
    times = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model_pred = family.predict(denoiser, latents, sigmas, conditioning)
            loss = (model_pred.float() - target).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_value_(parameters, 0.01)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        times.append(time.perf_counter())
    seconds = [after - before for before, after in itertools.pairwise(times)]
    return statistics.median(seconds[len(seconds) // 4 :])


def caption(index: int) -> str:
    """Of one length in tokens, so that both sides give the model the same work."""
    return f"image number {index:02d} of a benchmark, with a caption of usual length"


def write_run(folder: Path, steps: int) -> None:
    """A random model, 64 random images and the configuration of the trainer's side."""
    from PIL import Image

    write_model(folder / "model")
    images = folder / "images"
    images.mkdir()
    rng = random.Random(0)
    for index in range(64):
        Image.frombytes("RGB", (SIDE, SIDE), rng.randbytes(3 * SIDE * SIDE)).save(images / f"{index:03d}.png")
        (images / f"{index:03d}.txt").write_text(caption(index))
    config = {
        "model_family": "omnigen",
        "model_type": "lora",
        "lora_type": "lycoris",
        "pretrained_model_name_or_path": "model",
        "output_dir": "output",
        "cache_dir": "cache",
        "data_backend_config": "multidatabackend.json",
        "lycoris_config": "lycoris_config.json",
        "train_batch_size": BATCH_SIZE,
        "max_train_steps": steps,
        "num_train_epochs": 0,
        "mixed_precision": "bf16",
        "optimizer": "adamw_bf16",
        "max_grad_norm": 0.01,
        "grad_clip_method": "value",
        "gradient_checkpointing": False,
        "checkpoint_step_interval": 0,
        "validation_disable": True,
        "report_to": "none",
    }
    entry = {"id": "images", "type": "local", "instance_data_dir": "images", "caption_strategy": "textfile"}
    data = [entry | {"resolution": SIDE, "resolution_type": "pixel_area"}]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "multidatabackend.json").write_text(json.dumps(data))
    (folder / "lycoris_config.json").write_text(json.dumps(LYCORIS))


def write_model(folder: Path) -> None:
    """A random OmniGen of 4 to 5 million parameters, with the shipped example's tokenizer."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, OmniGenTransformer2DModel

    from simpletuner.examples import example_dir

    torch.manual_seed(0)
    factors = [1.0] * 32
    transformer = OmniGenTransformer2DModel(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=512,
        num_layers=6,
        pad_token_id=2,
        vocab_size=1024,
        max_position_embeddings=4096,
        rope_scaling={"short_factor": factors, "long_factor": factors},
        pos_embed_max_size=16,
    )
    count = sum(parameter.numel() for parameter in transformer.parameters())
    assert 4_000_000 <= count <= 5_000_000, count
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")
    AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    ).save_pretrained(folder / "vae")
    FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1).save_pretrained(folder / "scheduler")
    shutil.copytree(example_dir("omnigen-tiny") / "model" / "tokenizer", folder / "tokenizer")


if __name__ == "__main__":
    sys.exit(main())
