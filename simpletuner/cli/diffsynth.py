"""The LoRA scripts of DiffSynth-Studio as commands: `diffsynth MODEL` trains, `import diffsynth MODEL` writes files."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from simpletuner.cli.imports import processes_of
from simpletuner.cli.shared import PASS_ON, app, monitored, run_in_processes, say, say_for_all

_HELP = ("-h", "--help")


@app.command(
    context_settings=PASS_ON | {"help_option_names": []},
    short_help="Train a LoRA with the flags of DiffSynth-Studio's scripts.",
)
def diffsynth(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="flux, kolors, sd3 or hunyuan-dit.")] = "--help",
    monitor: Annotated[bool, typer.Option("--monitor", help="Show the run live on a page in the browser.")] = False,
) -> None:
    """Train as a script of DiffSynth-Studio does: simpletuner diffsynth MODEL --dataset_path ... [--key=value ...]

    MODEL is flux, kolors, sd3 or hunyuan-dit; `simpletuner diffsynth MODEL --help` lists its flags. The JSON files that
    they become are in the folder diffsynth of --output_path. `simpletuner import diffsynth MODEL ...` only writes them.
    """
    if model in _HELP:
        say(context.get_help())
        return
    from simpletuner.commands.diffsynth.flags import parser_of
    from simpletuner.commands.diffsynth.run import translate, write_run

    if any(word in _HELP for word in context.args):
        say(parser_of(model).format_help())
        return
    translation = translate(model, context.args, Path.cwd(), lambda rest: processes_of(rest, os.environ))
    config_file = write_run(translation, say_for_all)
    from simpletuner.launch import load_arguments

    loaded = load_arguments(translation.rest, os.environ, Path.cwd(), say_for_all, config_file)
    words = ["train", "--config", str(config_file), *translation.rest]
    with monitored(loaded) if monitor else nullcontext():
        run_in_processes(loaded, words)
