"""Images for the autoencoders: half of the tiny world, half of anything flat with edges.

An autoencoder that has seen only eight shapes would be useless for anybody's next concept, so it also learns
random polygons, ellipses, strokes and colors, several to an image.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from PIL import Image, ImageDraw

from .shapes import SHAPES, SUPERSAMPLING, draw, sample_scene


def _random_color(rng: random.Random) -> tuple[int, int, int]:
    return rng.randrange(256), rng.randrange(256), rng.randrange(256)


def render_anything(height: int, width: int, rng: random.Random) -> Image.Image:
    """One to four random polygons, ellipses or strokes on a flat background."""
    scale = SUPERSAMPLING // 2
    canvas = Image.new("RGB", (width * scale, height * scale), _random_color(rng))
    pen = ImageDraw.Draw(canvas)
    side = min(canvas.size)
    for _ in range(rng.randint(1, 4)):
        x, y = rng.uniform(0, canvas.width), rng.uniform(0, canvas.height)
        radius = side * rng.uniform(0.08, 0.4)
        reach = [(x + rng.uniform(-radius, radius), y + rng.uniform(-radius, radius)) for _ in range(rng.randint(3, 7))]
        kind = rng.choice(("polygon", "ellipse", "outline", "stroke"))
        if kind == "polygon":
            pen.polygon(reach, fill=_random_color(rng))
        elif kind == "stroke":
            pen.line(
                reach, fill=_random_color(rng), width=max(scale, int(side * rng.uniform(0.03, 0.1))), joint="curve"
            )
        else:
            flat = rng.uniform(0.4, 1.0)
            box = (x - radius, y - radius * flat, x + radius, y + radius * flat)
            outline = int(side * rng.uniform(0.04, 0.12)) if kind == "outline" else 0
            color = _random_color(rng)
            pen.ellipse(box, fill=None if outline else color, outline=color, width=outline or 1)
    return canvas.reduce(scale)


def to_pixel_values(images: list[Image.Image]) -> torch.Tensor:
    """Images of one size as a tensor in [-1, 1], (B, 3, H, W)."""
    array = np.stack([np.asarray(image) for image in images])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def to_images(pixel_values: torch.Tensor) -> list[Image.Image]:
    """The inverse of `to_pixel_values`, clamped to what an image can hold."""
    array = pixel_values.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(image) for image in array]


def sample_global_batch(batch_size: int, side: int, rng: random.Random) -> torch.Tensor:
    """Jittered images of the tiny world, every shape included, (B, 3, side, side)."""
    return to_pixel_values([draw(sample_scene(rng, SHAPES), side, rng=rng) for _ in range(batch_size)])


def num_processes(batch_size: int) -> int:
    """How many images of a training batch are of the tiny world."""
    return round(0.6 * batch_size)


def sample_training_batch(batch_size: int, side: int, rng: random.Random) -> torch.Tensor:
    """The first `num_processes` images are of the tiny world, the rest is anything, (B, 3, side, side)."""
    process_group = sample_global_batch(num_processes(batch_size), side, rng)
    anything = [render_anything(side, side, rng) for _ in range(batch_size - len(process_group))]
    return torch.cat([process_group, to_pixel_values(anything)])
