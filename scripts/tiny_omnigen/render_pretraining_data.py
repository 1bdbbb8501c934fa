"""Generates the images that the tiny OmniGen is pretrained on: every old shape, never the new one.

Captions lie next to the images (`caption_strategy: textfile`), one folder for each size. The same seed gives the
same bytes.

    python scripts/tiny_omnigen/render_pretraining_data.py --output build/tiny_omnigen/pretraining
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tiny_omnigen.shapes import OLD_SHAPES, balanced_scenes, draw


def render_folder(folder: Path, side: int, count: int, seed: int) -> None:
    """`count` square images, balanced over all words of the grammar."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{seed}/{side}")
    for index, scene in enumerate(balanced_scenes(count, rng, OLD_SHAPES)):
        draw(scene, side, rng=rng).save(folder / f"{index:05d}.png")
        (folder / f"{index:05d}.txt").write_text(scene.caption() + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("build/tiny_omnigen/pretraining"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--images",
        "--pictures",
        nargs="+",
        default=["64:12000", "128:3000"],
        metavar="SIDE:COUNT",
        help="side in pixels (a multiple of 16) and number of images, for each folder",
    )
    arguments = parser.parse_args()
    for entry in arguments.images:
        side, _, count = entry.partition(":")
        if not (side.isdigit() and count.isdigit()) or int(side) % 16:
            parser.error(f'--images "{entry}" is not SIDE:COUNT with a side that is a multiple of 16')
        render_folder(arguments.output / side, int(side), int(count), arguments.seed)
        print(f"generated {count} images of {side} px in {arguments.output / side}")


if __name__ == "__main__":
    main()
