"""A training step of each family against diffusers with PEFT, on the CPU: forward and backward pass with a LoRA.

Both sides have the same medium-size network with random weights, the same LoRA of rank 16 on the family's usual layers,
bf16 and one image. Ours is the step of a run, from latents to loss; theirs is the public class as published, PEFT's
LoRA and a mean squared error, called with the very inputs that ours made. Their noise and targets lie ready, so that
what surrounds the network counts against us.

The sides take turns, nine rounds in one process, and seconds are those that the CPU worked: other programs do
not count. A second copy of their side tells the spread: the median distance of its ratio from 1.

    python benchmarks/step_against_peft.py [sdxl flux ...] [--activation-memory low]

Blocks keep what a run on a CPU lets them keep, `activation_memory` `high`, unless another level is named.

With `--lowest` our own steps are compared, `activation_memory` `lowest` against `low`. The first may take 1.03 times
what the products ask for that it makes twice: 1.03 * (1 + their share of all products).

Goals: SDXL, FLUX.1, SD3 and Z-Image at most 1.00 and the spread, no family above 1.03. OmniGen2 and Qwen-Image 2.1 have
no public class to compare with. The last line is one JSON object; exit code 1 when a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, get_args

import torch
from gpu_rows import FULL as FULL_OMNIGEN
from kept_activations import Products
from public_models import ours as our_omnigen
from public_models import published as published_omnigen
from random_families import MEDIUM, Network, random_family
from torch import Tensor, nn

from simpletuner.activation_memory.modules import ActivationMemory, set_activation_memory
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.allocation import keep_freed_memory
from simpletuner.models.family import ModelFamily
from simpletuner.training.planning.shapes import empty_batch
from simpletuner.training.step import compute_losses, sample_noise

RANK, PIXELS = 16, 512
CPU = torch.device("cpu")
GOAL, OTHERS_GOAL, OF_THE_PRODUCTS = 1.00, 1.03, 1.03
NOT_ABOVE_THEIRS = ("sdxl", "flux", "sd3", "z_image")
OMNIGEN = FULL_OMNIGEN | {
    "hidden_size": 512, "num_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 1536,
    "rope_scaling": {"type": "su", "short_factor": [1.0] * 32, "long_factor": [3.0] * 32},
}  # fmt: skip
Step = Callable[[], Tensor]


def sides(name: str, network: Network, pixels: int, level: ActivationMemory) -> tuple[Step, Step, Step]:
    """(ours, theirs, theirs once more): each returns the loss of a forward pass."""
    ours, denoiser, family, layers = our_step(name, network, pixels)
    set_activation_memory(denoiser, level)
    seen: list[tuple[Any, Any]] = []
    hook = denoiser.register_forward_pre_hook(lambda _, inputs, named: seen.append((inputs, named)), with_kwargs=True)
    ours()
    hook.remove()
    return ours, *(published(family.public(), layers, *seen[0]) for _ in range(2))  # type: ignore[attr-defined]


def own_levels(name: str, network: Network, pixels: int) -> tuple[tuple[Step, Step, Step], float]:
    """((ours with `lowest`, with `low`, with `low` once more), the share of products that `lowest` makes twice)."""
    ours, denoiser, _, _ = our_step(name, network, pixels)

    def at(level: ActivationMemory) -> Step:
        def step() -> Tensor:
            set_activation_memory(denoiser, level)
            return ours()

        return step

    with Products() as counted:
        at("high")()
    return (at("lowest"), at("low"), at("low")), counted.widening / (2 * counted.all)


def our_step(name: str, network: Network, pixels: int) -> tuple[Step, nn.Module, ModelFamily, list[str]]:
    """(the loss of a forward pass, the denoiser, its family, the layers that are adapted)."""
    family = random_family(name, network, CPU)
    denoiser = family.load_denoiser()
    adapter = attach_lora(denoiser, LoraSettings(rank=RANK), family.spec, torch.bfloat16, seed=0)
    denoiser.train()
    batch = empty_batch(family, pixels, pixels, family.encode_prompts([""]))
    noise, quantiles = sample_noise(batch, 0, 0), torch.full((1,), 0.5, dtype=torch.float64)

    def ours() -> Tensor:
        return compute_losses(family, denoiser, batch, noise, quantiles).weighted_sum

    return ours, denoiser, family, [*adapter.layers]


def published(denoiser: nn.Module, layers: Sequence[str], inputs: Sequence[Any], named: dict[str, Any]) -> Step:
    """The public class with PEFT's LoRA on `layers`, called as it stands."""
    from peft import LoraConfig, inject_adapter_in_model

    pattern = "|".join(map(re.escape, layers))
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=pattern), denoiser)
    for parameter in denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    denoiser.train()

    def step() -> Tensor:
        output = denoiser(*inputs, **named)[0]
        output = torch.stack(output) if isinstance(output, list) else output
        return (output.float() - target).square().mean()

    target = torch.zeros(())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output = denoiser(*inputs, **named)[0]
    target = torch.randn(torch.stack(output).shape if isinstance(output, list) else output.shape)
    return step


def sides_of_omnigen(pixels: int, level: ActivationMemory) -> tuple[Step, Step, Step]:
    """OmniGen's denoiser takes other inputs here than its public class."""
    made = [make("omnigen", "lora", False, CPU, pixels, OMNIGEN) for make in (our_omnigen, *[published_omnigen] * 2)]
    set_activation_memory(made[0].denoiser, level)
    ours, theirs, again = (side.losses for side in made)
    return ours, theirs, again


def processor_seconds(step: Step) -> float:
    """Of a forward and backward pass. Gradients add up, on every side alike."""
    started = time.process_time()
    with torch.autocast("cpu", torch.bfloat16):
        loss = step()
    loss.backward()
    return time.process_time() - started


def compare(steps: Sequence[Step], rounds: int) -> dict[str, Any]:
    """Ours over theirs, and theirs over theirs; medians over rounds, in each of which another side begins."""
    for step in steps:
        processor_seconds(step)
    ratios: list[float] = []
    same: list[float] = []
    seconds: list[list[float]] = []
    for number in range(rounds):
        found = [0.0] * 3
        for place in range(3):
            which = (number + place) % 3
            found[which] = processor_seconds(steps[which])
        ours, theirs, again = found
        seconds.append(found)
        ratios.append(2 * ours / (theirs + again))
        same.append(again / theirs)
    return {
        "ratio": round(statistics.median(ratios), 4),
        "spread": round(statistics.median(abs(each - 1) for each in same), 4),
        "same_ratio": round(statistics.median(same), 4),
        "ours_seconds": round(statistics.median(each[0] for each in seconds), 4),
        "theirs_seconds": round(statistics.median(each[1] for each in seconds), 4),
        "ratios": [round(each, 3) for each in ratios],
    }


def limit_of(name: str, spread: float) -> float:
    return GOAL + spread if name in NOT_ABOVE_THEIRS else OTHERS_GOAL


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", help="all of them by default")
    parser.add_argument("--lowest", action="store_true", help="compare our steps with `lowest` and with `low`")
    parser.add_argument("--rounds", type=int, default=9)
    levels = get_args(ActivationMemory)
    parser.add_argument("--activation-memory", choices=levels, default="high", help="high by default, as of a run here")
    parser.add_argument("--pixels", type=int, default=PIXELS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args(words)
    if arguments.lowest and "omnigen" in arguments.families:
        parser.error("--lowest is for the families of random_families.MEDIUM")
    arguments.families = arguments.families or [*MEDIUM, *([] if arguments.lowest else ["omnigen"])]
    keep_freed_memory()  # as the program does at its start
    torch.set_num_threads(arguments.threads)
    rows = {}
    pixels, level = arguments.pixels, arguments.activation_memory
    for name in arguments.families:
        if arguments.lowest:
            made, products = own_levels(name, MEDIUM[name], pixels)
            rows[name] = compare(made, arguments.rounds) | {"products": round(products, 3)}
            rows[name]["limit"] = round(OF_THE_PRODUCTS * (1 + products), 4)
        else:
            made = sides_of_omnigen(pixels, level) if name == "omnigen" else sides(name, MEDIUM[name], pixels, level)
            rows[name] = compare(made, arguments.rounds)
            rows[name]["limit"] = round(limit_of(name, rows[name]["spread"]), 4)
        print(f"{name}: {json.dumps(rows[name])}", flush=True)
        del made
    missed = [name for name, row in rows.items() if row["ratio"] > row["limit"]]
    figures = {"benchmark": "step_against_peft", "rank": RANK, "pixels": arguments.pixels, "torch": torch.__version__}
    level = "lowest against low" if arguments.lowest else arguments.activation_memory
    figures |= {"threads": arguments.threads, "activation_memory": level}
    print(json.dumps(figures | {"missed": missed, "rows": rows}))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
