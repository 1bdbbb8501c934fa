"""Pictures for the autoencoders: half of the tiny world, half of anything flat with edges.

An autoencoder that has seen only eight shapes would be useless for anybody's next concept, so it also learns
random polygons, ellipses, strokes and colours, several to a picture.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image, ImageDraw

from .shapes import SHAPES, SUPERSAMPLING, draw, sample_scene


def _random_colour(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def draw_anything(height: int, width: int, rng: random.Random) -> Image.Image:
    """One to four random polygons, ellipses or strokes on a flat background."""
    scale = SUPERSAMPLING // 2
    canvas = Image.new("RGB", (width * scale, height * scale), _random_colour(rng))
    pen = ImageDraw.Draw(canvas)
    side = min(canvas.size)
    for _ in range(rng.randint(1, 4)):
        x, y = rng.uniform(0, canvas.width), rng.uniform(0, canvas.height)
        radius = side * rng.uniform(0.08, 0.4)
        reach = [(x + rng.uniform(-radius, radius), y + rng.uniform(-radius, radius)) for _ in range(rng.randint(3, 7))]
        kind = rng.choice(("polygon", "ellipse", "outline", "stroke"))
        if kind == "polygon":
            pen.polygon(reach, fill=_random_colour(rng))
        elif kind == "stroke":
            pen.line(
                reach, fill=_random_colour(rng), width=max(scale, int(side * rng.uniform(0.03, 0.1))), joint="curve"
            )
        else:
            flat = rng.uniform(0.4, 1.0)
            box = (x - radius, y - radius * flat, x + radius, y + radius * flat)
            outline = int(side * rng.uniform(0.04, 0.12)) if kind == "outline" else 0
            colour = _random_colour(rng)
            pen.ellipse(box, fill=None if outline else colour, outline=colour, width=outline or 1)
    return canvas.reduce(scale)


def to_pixel_values(pictures: list[Image.Image]) -> torch.Tensor:
    """Pictures of one size as a tensor in [-1, 1], (B, 3, H, W)."""
    array = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_pictures(pixel_values: torch.Tensor) -> list[Image.Image]:
    """The inverse of `to_pixel_values`, clamped to what a picture can hold."""
    array = pixel_values.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in array]


def draw_world_batch(batch_size: int, side: int, rng: random.Random) -> torch.Tensor:
    """Jittered pictures of the tiny world, every shape included, (B, 3, side, side)."""
    return to_pixel_values([draw(sample_scene(rng, SHAPES), side, rng=rng) for _ in range(batch_size)])


def num_world(batch_size: int) -> int:
    """How many pictures of a training batch are of the tiny world."""
    return round(0.6 * batch_size)


def draw_training_batch(batch_size: int, side: int, rng: random.Random) -> torch.Tensor:
    """The first `num_world` pictures are of the tiny world, the rest is anything, (B, 3, side, side)."""
    world = draw_world_batch(num_world(batch_size), side, rng)
    anything = [draw_anything(side, side, rng) for _ in range(batch_size - len(world))]
    return torch.cat([world, to_pixel_values(anything)])
