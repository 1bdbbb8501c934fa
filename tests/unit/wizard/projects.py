"""Folders and answers for tests of the wizard."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from textual.pilot import Pilot

from simpletuner.hardware import GIB, Hardware
from simpletuner.wizard.answers import Answers
from simpletuner.wizard.app import Wizard
from simpletuner.wizard.command import Given, configure_without_screens
from simpletuner.wizard.project import Project, open_project
from tests.runs import write_images

CPU = Hardware("cpu", "processor", 16 * GIB, 16 * GIB, 8)
SMALL_GPU = Hardware("cuda", "GPU", 12 * GIB, 32 * GIB, 8)
LARGE_GPU = Hardware("cuda", "GPU", 80 * GIB, 256 * GIB, 32)
CONFIG = Path("config/config.json")


def answers(**given: object) -> Answers:
    return Answers(**{"hardware": CPU, "family": "omnigen", "images": "images"} | given)


def new_folder(folder: Path) -> Path:
    """A working folder with images to learn, to hold out, and for prior preservation."""
    write_images(folder / "images", 4, seed=1)
    write_images(folder / "held_out", 2, seed=2)
    write_images(folder / "others", 3, seed=3)
    write_images(folder / "before", 4, seed=4)
    return folder


def configured(folder: Path, model: Path, *arguments: str, **given: object) -> Project:
    """A run that the command line wrote."""
    project = open_project(CONFIG, folder, CPU)
    options = {"goal": "subject", "data": "images", "model": str(model), "instance_prompt": "ohwx box"} | given
    return configure_without_screens(project, Given(**options, arguments=arguments), lambda line: None)


def contents(folder: Path) -> dict[str, str]:
    """Every JSON file of a configuration, by name."""
    return {path.name: path.read_text() for path in (folder / "config").glob("*.json")}


def drive(folder: Path, steps: Callable[[Pilot], Awaitable[None]]) -> Wizard:
    """Run the wizard in `folder` with the keys that `steps` presses."""
    wizard = Wizard(open_project(CONFIG, folder, CPU))

    async def run() -> None:
        async with wizard.run_test(size=(80, 24)) as pilot:
            await steps(pilot)

    asyncio.run(run())
    return wizard
