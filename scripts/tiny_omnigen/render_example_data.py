"""Generates the data of the shipped example: the new shape to learn, a held-out part, and old shapes to remember.

The concept images cover half of the (color, background) pairs, each color and each background as often, so
that `benchmarks/concept_score.py` can ask for the pairs that they lack.

    python scripts/tiny_omnigen/render_example_data.py
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_omnigen.shapes import BACKGROUNDS, COLORS, NEW_SHAPE, OLD_SHAPES, POSITIONS, SIZES, Scene, draw

DEFAULT_OUTPUT = Path(__file__).resolve().parents[2] / "simpletuner/examples/omnigen-tiny/datasets"
NUM_CONCEPT = 120  # each of the fifteen layouts eight times
NUM_EVAL = 8
SIDE = 128


def seen_pairs() -> list[tuple[str, str]]:
    """Half of the (color, background) pairs; every color meets four backgrounds, every background four colors."""
    return [
        (color, background)
        for i, color in enumerate(COLORS)
        for j, background in enumerate(BACKGROUNDS)
        if (i + j) % len(BACKGROUNDS) in (0, 1, 3, 6)
    ]


def concept_scenes(rng: random.Random) -> tuple[list[Scene], list[Scene]]:
    """Scenes to train on and scenes held out; no scene occurs twice, and each seen pair is trained on."""
    pairs = rng.sample(seen_pairs(), len(seen_pairs()))
    layouts = [(size, position) for size in SIZES for position in POSITIONS]
    order: list[tuple[str, str]] = []
    scenes: dict[Scene, None] = {}
    while len(scenes) < NUM_CONCEPT + NUM_EVAL:
        order = order or rng.sample(layouts, len(layouts))
        color, background = pairs[len(scenes) % len(pairs)]
        scenes[Scene(NEW_SHAPE, color, background, *order.pop())] = None
    generated = list(scenes)
    return generated[:NUM_CONCEPT], generated[NUM_CONCEPT:]


def regularisation_scenes(rng: random.Random) -> list[Scene]:
    """One scene of an old shape for each (color, background) pair."""
    pairs = [(color, background) for color in COLORS for background in BACKGROUNDS]
    rng.shuffle(pairs)
    return [
        Scene(OLD_SHAPES[i % len(OLD_SHAPES)], *pair, rng.choice(list(SIZES)), rng.choice(list(POSITIONS)))
        for i, pair in enumerate(pairs)
    ]


def write_dataset(folder: Path, scenes: Sequence[Scene], rng: random.Random) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(scenes):
        stem = f"{index:02d}-{scene.color}-{scene.shape}-on-{scene.background}"
        draw(scene, SIDE, rng=rng).save(folder / f"{stem}.png", optimize=True)
        (folder / f"{stem}.txt").write_text(scene.caption() + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    concept, held_out = concept_scenes(rng)
    datasets = {"concept": concept, "concept-eval": held_out, "regularisation": regularisation_scenes(rng)}
    for name, scenes in datasets.items():
        write_dataset(arguments.output / name, scenes, rng)
        print(f"generated {len(scenes)} images in {arguments.output / name}")


if __name__ == "__main__":
    main()
