"""Did the adapter learn the concept, and did it forget anything? Judged from the pixels, by a program.

Base and adapter generate the same prompts from the same noise: the new shape in (color, background) pairs that the
training set lacks, and old shapes. The sheet shows every image with its verdict, so that a person can check the
judge; its green frame means right.

    python benchmarks/concept_score.py --adapter output/omnigen-tiny/pytorch_lora_weights.safetensors --side 128
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY / "scripts"))

from tiny_omnigen.judge import Judge, Verdict  # noqa: E402
from tiny_omnigen.shapes import (  # noqa: E402
    BACKGROUNDS,
    COLORS,
    NEW_SHAPE,
    OLD_SHAPES,
    POSITIONS,
    SIZES,
    Scene,
    parse_caption,
)

EXAMPLE = REPOSITORY / "simpletuner/examples/omnigen-tiny"
NUM_PROMPTS = 64
LARGEST_BASE_SHARE = 0.1
SMALLEST_ADAPTER_SHARE = 0.95
LARGEST_LOSS_OF_OLD = 0.05
BATCH_SIZE = 16
# What captions are dropped to in training; the model has never seen the words of a usual negative prompt.
UNCONDITIONAL = "<cfg>"

Generator = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]


def make_generator(model: Path, adapter: Path | None, steps: int, guidance: float, side: int) -> Generator:
    """A function from prompts and their seeds to images; `adapter` None generates with the base."""
    import torch
    from lycoris import create_lycoris_from_weights

    from simpletuner.families.registry import get_family_class, get_spec
    from simpletuner.models.components import ModelSource
    from simpletuner.validation.prompts import GenerationSettings, ImageRequest
    from simpletuner.validation.sampling import make_images

    spec = get_spec("omnigen")
    family = get_family_class(spec)(spec, ModelSource(str(model)), torch.device("cpu"), torch.float32)
    denoiser = family.load_denoiser()
    if adapter is not None:
        network, _ = create_lycoris_from_weights(1.0, str(adapter), denoiser)
        network.apply_to()
        network.eval()
    pipeline = family.pipeline(denoiser, family.load_vae())
    settings = GenerationSettings(steps, guidance, UNCONDITIONAL)

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        asked = zip(prompts, seeds, strict=True)
        requests = [ImageRequest("score", prompt, side, side, seed, settings) for prompt, seed in asked]
        images = make_images(pipeline, requests, BATCH_SIZE)
        return [image.image for image in images]

    return draw


def unseen_pairs(concept: Path) -> list[tuple[str, str]]:
    """(color, background) pairs that the captions of the training set lack."""
    captions = [path.read_text(encoding="utf-8") for path in sorted(concept.glob("*.txt"))]
    if not captions:
        raise SystemExit(f"error: there are no captions (*.txt) in {concept}")
    seen = {(scene.color, scene.background) for scene in map(parse_caption, captions)}
    pairs = [(color, background) for color in COLORS for background in BACKGROUNDS]
    return [pair for pair in pairs if pair not in seen]


def choose_scenes(
    shapes: Sequence[str], pairs: Sequence[tuple[str, str]], count: int, rng: random.Random
) -> list[Scene]:
    """Scenes that use pairs, shapes, sizes and positions evenly."""
    layouts = [(size, position) for size in SIZES for position in POSITIONS]
    pools = [rng.sample(pool, len(pool)) for pool in (list(shapes), list(pairs), layouts)]
    scenes = []
    for i in range(count):
        shape, pair, layout = (pool[i % len(pool)] for pool in pools)
        # A second round over the pairs meets other layouts, whatever the lengths of the lists.
        size, position = layout if i < len(pools[1]) else pools[2][(i * 7 + 3) % len(layouts)]
        scenes.append(Scene(shape, *pair, size, position))
    return scenes


@functools.cache
def judge_of(width: int, height: int) -> Judge:
    """The judge of a size, built once: its templates take longer than judging."""
    return Judge(height, width)


def judge_all(draw: Generator, scenes: Sequence[Scene], seed: int) -> list[tuple[Image.Image, Scene, Verdict]]:
    images = draw([scene.caption() for scene in scenes], [seed * 1000 + i for i in range(len(scenes))])
    judge = judge_of(*images[0].size)
    return [(image, scene, judge.judge(image, scene)) for image, scene in zip(images, scenes, strict=True)]


def share_right(judged: Sequence[tuple[Image.Image, Scene, Verdict]]) -> float:
    return sum(verdict.is_right for *_, verdict in judged) / len(judged)


def write_sheet(path: Path, sections: dict[str, list[tuple[Image.Image, Scene, Verdict]]], columns: int = 8) -> None:
    """All images, small ones enlarged, with what was asked and the verdict below each."""
    shown = 128
    cell_width, cell_height, heading = shown + 60, shown + 46, 24
    rows = sum(-(-len(judged) // columns) for judged in sections.values())
    sheet = Image.new("RGB", (columns * cell_width, rows * cell_height + heading * len(sections)), "white")
    pen = ImageDraw.Draw(sheet)
    y = 0
    for title, judged in sections.items():
        pen.text((8, y + 6), f"{title}: {100 * share_right(judged):.0f} % right", fill="black")
        y += heading
        for i, (image, scene, verdict) in enumerate(judged):
            left, top = (i % columns) * cell_width + 6, y + (i // columns) * cell_height + 6
            frame = "green" if verdict.is_right else "red"
            pen.rectangle((left - 4, top - 4, left + shown + 3, top + shown + 3), fill=frame)
            sheet.paste(image.resize((shown, shown), Image.Resampling.NEAREST), (left, top))
            words = [scene.size, scene.color, scene.shape, scene.position]
            asked = " ".join(word for word in words if word)
            lines = f"{asked}\non {scene.background}: {verdict.reason}"
            pen.multiline_text((left - 2, top + shown + 4), lines, fill=frame, font_size=9, spacing=1)
        y += -(-len(judged) // columns) * cell_height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def score(base: Generator, adapted: Generator, concept: Path, seed: int, sheet: Path) -> dict[str, object]:
    rng = random.Random(seed)
    new = choose_scenes((NEW_SHAPE,), unseen_pairs(concept), NUM_PROMPTS, rng)
    every_pair = [(color, background) for color in COLORS for background in BACKGROUNDS]
    old = choose_scenes(OLD_SHAPES, every_pair, NUM_PROMPTS, rng)
    sections = {
        f"base, {NEW_SHAPE}": judge_all(base, new, seed),
        f"adapter, {NEW_SHAPE}": judge_all(adapted, new, seed),
        "base, old shapes": judge_all(base, old, seed + 1),
        "adapter, old shapes": judge_all(adapted, old, seed + 1),
    }
    write_sheet(sheet, sections)
    base_new, adapter_new, base_old, adapter_old = map(share_right, sections.values())
    is_reached = (
        base_new < LARGEST_BASE_SHARE
        and adapter_new >= SMALLEST_ADAPTER_SHARE
        and base_old - adapter_old <= LARGEST_LOSS_OF_OLD + 1e-9
    )
    return {
        "seed": seed,
        "prompts": NUM_PROMPTS,
        "unseen_pairs": len(unseen_pairs(concept)),
        "base_concept": base_new,
        "adapter_concept": adapter_new,
        "base_old": base_old,
        "adapter_old": adapter_old,
        "goal_reached": is_reached,
        "sheet": str(sheet),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True, help="LyCORIS weights (.safetensors)")
    parser.add_argument("--model", type=Path, default=EXAMPLE / "model", help="model folder of the base")
    parser.add_argument("--concept", type=Path, default=EXAMPLE / "datasets/concept", help="what was trained on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=64, help="width and height in pixels, a multiple of 16")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps")
    parser.add_argument("--guidance", type=float, default=2.5)
    parser.add_argument("--sheet", type=Path, default=Path("output/concept_score.png"))
    arguments = parser.parse_args()
    if not arguments.adapter.is_file():
        parser.error(f"there is no adapter file {arguments.adapter}")
    base = make_generator(arguments.model, None, arguments.steps, arguments.guidance, arguments.side)
    adapted = make_generator(arguments.model, arguments.adapter, arguments.steps, arguments.guidance, arguments.side)
    figures = score(base, adapted, arguments.concept, arguments.seed, arguments.sheet)
    print(json.dumps(figures))
    return 0 if figures["goal_reached"] else 1


if __name__ == "__main__":
    sys.exit(main())
