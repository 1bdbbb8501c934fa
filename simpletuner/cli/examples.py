"""`simpletuner examples`: what is shipped, and a copy of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simpletuner.cli.shared import app, say

examples_app = typer.Typer(
    help="List or copy the shipped examples, and configurations for a model on a card.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(examples_app, name="examples")


@examples_app.command("list")
def list_examples() -> None:
    """List the shipped examples, and configurations of every model for cards of 8 to 80 GB."""
    from simpletuner.examples import example_names, example_summary
    from simpletuner.examples.presets import preset_lines

    for name in example_names():
        print(f"{name}  ({example_summary(name)})")
    for line in preset_lines():
        print(line)


@examples_app.command("copy")
def copy_example(
    name: Annotated[str, typer.Argument(help="As `simpletuner examples list` prints it.")],
    folder: Annotated[Path | None, typer.Argument(help="New folder; ./NAME if not given.", show_default=False)] = None,
) -> None:
    """Copy an example to a folder of your own, to change it."""
    from simpletuner.examples import copy_example as copy

    destination = copy(name, folder or Path(name))
    say(f"copied to {destination}; train it with")
    say(f"  CONFIG_PATH={destination / 'config.json'} simpletuner train")
