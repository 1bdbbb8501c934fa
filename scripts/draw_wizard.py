"""Draw the screens of `simpletuner configure` for the documentation: python scripts/draw_wizard.py documentation/images

The machine and the pictures are made up, so that the same screens come out everywhere.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import tempfile
from pathlib import Path

from PIL import Image
from textual import events
from textual.pilot import Pilot

from simpletuner.hardware import GIB, Hardware
from simpletuner.wizard.app import Wizard
from simpletuner.wizard.project import open_project

MACHINE = Hardware("cuda", "NVIDIA GeForce RTX 4090", 24 * GIB, 64 * GIB, 16)
SIZES = ((1536, 1024), (1024, 1536), (1200, 1200), (1920, 1080))


def main(destination: Path) -> None:
    destination = destination.absolute()
    destination.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        draw_pictures(Path("datasets/luna"), 24)
        draw_pictures(Path("datasets/luna-held-out"), 4)
        Path("datasets/luna/unfinished.png").write_bytes(b"\x89PNG")
        for name, image in asyncio.run(screens()).items():
            (destination / f"configure-{name}.svg").write_text(image, encoding="utf-8")
        os.chdir(destination)


def draw_pictures(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    rng = random.Random(str(folder))
    for number in range(count):
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        Image.new("RGB", SIZES[number % len(SIZES)], colour).save(folder / f"{number:02d}.jpg")


async def screens() -> dict[str, str]:
    """Name -> SVG of the screens that the page shows."""
    wizard = Wizard(open_project(Path("config/config.json"), Path.cwd(), MACHINE))
    images = {}
    async with wizard.run_test(size=(100, 30)) as pilot:

        async def keep(name: str) -> None:
            await pilot.pause(0.3)
            images[name] = wizard.export_screenshot()

        await keep("goal")
        await pilot.press("ctrl+n", "ctrl+n")
        await fill_in(pilot, "pictures", "datasets/luna")
        await fill_in(pilot, "eval_pictures", "datasets/luna-held-out")
        await fill_in(pilot, "instance_prompt", "luna cat")
        while wizard.is_looking:
            await pilot.pause(0.1)
        await keep("pictures")
        await pilot.press("ctrl+n")
        wizard.query_one("#learning_rate").focus()
        await keep("training")
        await pilot.press("ctrl+n", "ctrl+n", "ctrl+n")
        await keep("review")
    return images


async def fill_in(pilot: Pilot, field: str, text: str) -> None:
    pilot.app.query_one(f"#{field}").focus()
    await pilot.pause()
    pilot.app.focused.post_message(events.Paste(text))
    await pilot.pause()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
