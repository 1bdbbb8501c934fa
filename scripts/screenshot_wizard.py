"""Render the screens of `simpletuner configure`: python scripts/screenshot_wizard.py documentation/images

The machine and the images are made up, so that the same screens come out everywhere.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image, ImageColor, ImageDraw
from textual import events
from textual.pilot import Pilot

from simpletuner.hardware import GIB, Hardware
from simpletuner.wizard.app import Wizard
from simpletuner.wizard.project import open_project
from simpletuner.wizard.review import Review

MACHINE = Hardware("cuda", "NVIDIA GeForce RTX 4090", 24 * GIB, 64 * GIB, 16)
SIZES = ((1536, 1024), (1024, 1536), (1200, 1200), (1920, 1080))


def main(destination: Path) -> None:
    destination = destination.absolute()
    os.environ["HF_HOME"] = "nowhere"  # the same machine for everybody: without the model
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_images(Path("datasets/luna"), 24)
        write_images(Path("datasets/luna-held-out"), 4)
        Path("datasets/luna/unfinished.png").write_bytes(b"\x89PNG")
        for name, image in asyncio.run(screens()).items():
            (destination / f"configure-{name}.svg").write_text(image, encoding="utf-8")
        os.chdir(destination)


def write_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rng = random.Random(str(folder))
    for number in range(count):
        render_landscape(SIZES[number % len(SIZES)], rng).save(folder / f"{number:02d}.jpg")


def render_landscape(size: tuple[int, int], rng: random.Random) -> Image.Image:
    """A sky that brightens toward the ground, a sun and two ranges of hills: something to see in a thumbnail."""
    width, height = size
    hue = rng.randrange(360)
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    for row in range(height):
        draw.line((0, row, width, row), ImageColor.getrgb(f"hsl({hue}, 60%, {25 + 50 * row // height}%)"))
    x, y, radius = rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.45) * height, 0.12 * min(size)
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), f"hsl({(hue + 180) % 360}, 90%, 75%)")
    for top, light in ((0.6, 32), (0.75, 18)):
        peaks = [(width * step / 6, height * (top + rng.uniform(-0.1, 0.1))) for step in range(7)]
        draw.polygon([(0, height), *peaks, (width, height)], f"hsl({(hue + 130) % 360}, 45%, {light}%)")
    return image


async def screens() -> dict[str, str]:
    """Name -> SVG of the screens that the page shows."""
    wizard = Wizard(open_project(Path("config/config.json"), Path.cwd(), MACHINE))
    images = {}
    async with wizard.run_test(size=(100, 35)) as pilot:

        async def keep(name: str) -> None:
            await pilot.pause(1.0)
            images[name] = wizard.export_screenshot()

        await keep("goal")
        await pilot.press("ctrl+n")
        await keep("model")
        await pilot.press("ctrl+n")
        await fill_in(pilot, "pictures", "datasets/luna")
        await fill_in(pilot, "eval_images", "datasets/luna-held-out")
        await fill_in(pilot, "instance_prompt", "luna cat")
        while wizard.is_looking:
            await pilot.pause(0.1)
        await keep("pictures")
        await pilot.press("ctrl+n")
        wizard.query_one("#learning_rate").focus()
        await keep("training")
        await pilot.press("ctrl+n", "ctrl+n")
        await keep("tracking")
        await pilot.press("ctrl+n")
        while not wizard.query_one(Review).estimated:
            await pilot.pause(0.1)
        await keep("review")
    return images


async def fill_in(pilot: Pilot[Any], field: str, text: str) -> None:
    pilot.app.query_one(f"#{field}").focus()
    await pilot.pause()
    pilot.app.query_one(f"#{field}").post_message(events.Paste(text))
    await pilot.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
