"""The tiny world: images that their captions determine.

The shipped tiny OmniGen must generate crisp images after little training, and a program must be able to say from
the pixels alone whether an image is right. Both need a world in which a caption fixes the image up to a
small jitter: one shape, one color, one flat background, a size, a position.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 35, 35),
    "green": (50, 175, 50),
    "blue": (45, 90, 235),
    "yellow": (248, 218, 40),
    "orange": (245, 130, 25),
    "purple": (130, 50, 190),
    "cyan": (50, 205, 230),
    "magenta": (235, 60, 170),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (18, 18, 18),
    "gray": (128, 128, 128),
    "brown": (115, 72, 38),
    "navy": (20, 30, 105),
    "teal": (0, 95, 110),
    "mint": (170, 235, 195),
    "lilac": (200, 170, 240),
}
OLD_SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring", "crescent")
NEW_SHAPE = "star"
SHAPES = (*OLD_SHAPES, NEW_SHAPE)

# Radius of the circumscribed circle as a share of the image's side; "" is the medium size, which has no word.
SIZES = {"small": 0.22, "": 0.28, "large": 0.36}
# Direction of the offset from the center; "" is the center, which has no words.
POSITIONS = {
    "": (0, 0),
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
}
EDGE_MARGIN = 0.04
POSITION_JITTER = 0.015
SIZE_JITTER = 0.04
SUPERSAMPLING = 8

Point = tuple[float, float]
Polygon = list[Point]


@dataclass(frozen=True)
class Scene:
    """What a caption says: the words, and nothing that the words leave open."""

    shape: str
    color: str
    background: str
    size: str = ""
    position: str = ""

    def caption(self) -> str:
        words = [word for word in (self.size, self.color, self.shape, self.position) if word]
        article = "an" if words[0][0] in "aeiou" else "a"
        return f"{article} {' '.join(words)} on a {self.background} background"


def parse_caption(caption: str) -> Scene:
    """The scene that a caption describes: the inverse of `Scene.caption`."""
    words = caption.strip().removeprefix("an ").removeprefix("a ")
    subject, separator, ground = words.rpartition(" on a ")
    background = ground.removesuffix(" background")
    position = next((p for p in POSITIONS if p and subject.endswith(f" {p}")), "")
    parts = subject.removesuffix(f" {position}").split() if position else subject.split()
    size = parts.pop(0) if parts and parts[0] in SIZES else ""
    known = separator and len(parts) == 2 and parts[0] in COLORS and parts[1] in SHAPES and background in BACKGROUNDS
    if not known:
        raise ValueError(
            f'"{caption}" is not a caption of the tiny world, such as "a red circle on a white background"'
        )
    return Scene(parts[1], parts[0], background, size, position)


def _regular(corners: int, radius: float = 1.0, turn: float = 0.0) -> Polygon:
    """Corners on a circle about the origin, the first one straight up, turned by `turn` radians."""
    angles = (turn - math.pi / 2 + 2 * math.pi * i / corners for i in range(corners))
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _star(points: int = 5, inner: float = 0.4) -> Polygon:
    outside, inside = _regular(points), _regular(points, inner, math.pi / points)
    return [corner for pair in zip(outside, inside, strict=True) for corner in pair]


def shape_layers(shape: str) -> list[tuple[Polygon, bool]]:
    """Polygons within the unit circle (y points down), painted in order: True adds, False cuts out."""
    half = math.sqrt(0.5)
    arm = 0.3
    if shape == "circle":
        return [(_regular(96, 0.92), True)]
    if shape == "square":
        return [([(-half, -half), (half, -half), (half, half), (-half, half)], True)]
    if shape == "triangle":
        return [(_regular(3), True)]
    if shape == "diamond":
        return [([(0, -1), (0.6, 0), (0, 1), (-0.6, 0)], True)]
    if shape == "cross":
        upright = [(-arm, -0.95), (arm, -0.95), (arm, 0.95), (-arm, 0.95)]
        return [(upright, True), ([(y, x) for x, y in upright], True)]
    if shape == "ring":
        return [(_regular(96, 0.95), True), (_regular(96, 0.52), False)]
    if shape == "crescent":
        bite = [(x + 0.5, y) for x, y in _regular(96, 0.78)]
        return [(_regular(96, 0.95), True), (bite, False)]
    if shape == "star":
        return [(_star(), True)]
    raise ValueError(f'"{shape}" is not a shape of the tiny world; known are {", ".join(SHAPES)}')


def write_mask(
    layers: Sequence[tuple[Polygon, bool]], center: Point, radius: float, height: int, width: int
) -> np.ndarray:
    """Coverage in [0, 1], (H, W). `center` (x, y) and `radius` are in pixels; the edges are anti-aliased."""
    canvas = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING), 0)
    pen = ImageDraw.Draw(canvas)
    for polygon, adds in layers:
        corners = [
            ((center[0] + radius * x) * SUPERSAMPLING - 0.5, (center[1] + radius * y) * SUPERSAMPLING - 0.5)
            for x, y in polygon
        ]
        pen.polygon(corners, fill=255 if adds else 0)
    return np.asarray(canvas.reduce(SUPERSAMPLING), dtype=np.float32) / 255


def paint(mask: np.ndarray, color: Sequence[int], background: Sequence[int]) -> np.ndarray:
    """Blends two flat colors by coverage: uint8, (H, W, 3)."""
    blend = mask[..., None]
    image = blend * np.asarray(color, np.float32) + (1 - blend) * np.asarray(background, np.float32)
    return np.round(image).astype(np.uint8)


def place(scene: Scene, height: int, width: int, rng: random.Random | None = None) -> tuple[Point, float]:
    """Center (x, y) and radius in pixels of a scene's shape; with `rng`, jittered a little."""
    side = min(height, width)
    radius = SIZES[scene.size]
    offset = 0.5 - radius - EDGE_MARGIN
    direction = POSITIONS[scene.position]
    shift = [0.0, 0.0]
    if rng is not None:
        shift = [rng.uniform(-POSITION_JITTER, POSITION_JITTER) for _ in range(2)]
        radius *= 1 + rng.uniform(-SIZE_JITTER, SIZE_JITTER)
    # The offset is measured from the nearest edge, so that "on the left" touches the left of a wide image too.
    reach = (width / side - 0.5 * 2 + 2 * offset) / 2, (height / side - 0.5 * 2 + 2 * offset) / 2
    x = width / 2 + side * (direction[0] * reach[0] + shift[0])
    y = height / 2 + side * (direction[1] * reach[1] + shift[1])
    return (x, y), radius * side


def draw(scene: Scene, height: int = 64, width: int | None = None, rng: random.Random | None = None) -> Image.Image:
    """The image of a scene. Without `rng` it is generated without jitter."""
    width = width or height
    center, radius = place(scene, height, width, rng)
    mask = write_mask(shape_layers(scene.shape), center, radius, height, width)
    return Image.fromarray(paint(mask, COLORS[scene.color], BACKGROUNDS[scene.background]))


def sample_scene(rng: random.Random, shapes: Sequence[str] = OLD_SHAPES) -> Scene:
    """A scene generated evenly over shapes, colors, backgrounds, sizes and positions."""
    return Scene(
        rng.choice(shapes),
        rng.choice(list(COLORS)),
        rng.choice(list(BACKGROUNDS)),
        rng.choice(list(SIZES)),
        rng.choice(list(POSITIONS)),
    )


def balanced_scenes(count: int, rng: random.Random, shapes: Sequence[str] = OLD_SHAPES) -> Iterator[Scene]:
    """`count` scenes in which every combination of words occurs equally often, to within one."""
    everything = [
        Scene(shape, color, background, size, position)
        for shape in shapes
        for color in COLORS
        for background in BACKGROUNDS
        for size in SIZES
        for position in POSITIONS
    ]
    remaining: list[Scene] = []
    for _ in range(count):
        if not remaining:
            remaining = rng.sample(everything, len(everything))
        yield replace(remaining.pop())
