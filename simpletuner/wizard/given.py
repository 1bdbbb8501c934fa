"""What `simpletuner configure` takes on the command line, each option declared once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

DEVICE_MEMORY_HELP = "GiB of the GPU that will train, if it is in another machine: 8, 12, 16, 24, 48, 80, ..."


@dataclass(frozen=True)
class Given:
    """What the command line says; None where it says nothing.

    Args:
        arguments: `env=NAME` and options of the run, `--key=value`.
    """

    goal: Annotated[str | None, typer.Option(help="subject, style, edit or full.")] = None
    family: Annotated[str | None, typer.Option(help="Model family.")] = None
    flavour: Annotated[str | None, typer.Option(help="Published checkpoint of the family.")] = None
    model: Annotated[str | None, typer.Option(help="Model folder or hub id in place of the flavor's.")] = None
    data: Annotated[str | None, typer.Option(help="Folder with the images.")] = None
    eval_data: Annotated[str | None, typer.Option(help="Folder with images that are never trained on.")] = None
    regularisation_data: Annotated[str | None, typer.Option(help="Folder for prior preservation.")] = None
    adapter: Annotated[
        str | None, typer.Option(help="lokr, lora, dora, or another algorithm of LyCORIS; not of goal full.")
    ] = None
    factor: Annotated[int | None, typer.Option(help="Of lokr: the larger, the smaller the adapter.", min=1)] = None
    rank: Annotated[int | None, typer.Option(help="For other adapters: the rank.", min=1)] = None
    layers: Annotated[str | None, typer.Option(help="For LyCORIS: all, or attention.")] = None
    reference_data: Annotated[
        str | None, typer.Option(help="Of goal edit: the images before the change, each named as the one after.")
    ] = None
    captions: Annotated[str | None, typer.Option(help="filename, textfile or instanceprompt.")] = None
    instance_prompt: Annotated[str | None, typer.Option(help="What the subject is called.")] = None
    prompt: Annotated[list[str] | None, typer.Option(help="Validation prompt; may be given several times.")] = None
    output_dir: Annotated[str | None, typer.Option(help="Folder of the results.")] = None
    config: Annotated[Path | None, typer.Option(help="The config.json to make or edit.")] = None
    device_memory: Annotated[int | None, typer.Option(help=DEVICE_MEMORY_HELP, min=1, show_default=False)] = None
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Existing files may be changed.")] = False
    arguments: tuple[str, ...] = ()

    @property
    def has_answers(self) -> bool:
        """Whether more than the place of the files was said, so that nothing needs to be asked."""
        from simpletuner.launch import split_arguments

        _, options = split_arguments(self.arguments)
        said = [getattr(self, each.name) for each in fields(self) if each.name not in ("config", "arguments")]
        return bool(options) or any(each not in (None, False) for each in said)
