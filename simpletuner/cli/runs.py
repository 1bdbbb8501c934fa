"""Verbs of a run: to configure it, look at it beforehand, train it."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from simpletuner.cli.loading import load, load_words
from simpletuner.cli.shared import (
    PASS_ON,
    app,
    monitored,
    print_to_stderr,
    run_in_processes,
    say,
    say_for_all,
    takes,
)
from simpletuner.errors import ConfigError, Problem
from simpletuner.hardware import GIB
from simpletuner.wizard.given import DEVICE_MEMORY_HELP, Given


@app.command(context_settings=PASS_ON, short_help="Train as config.json says.")
def train(
    context: typer.Context,
    monitor: Annotated[bool, typer.Option("--monitor", help="Show the run live on a page in the browser.")] = False,
) -> None:
    """Train as the configuration says: simpletuner train [example=NAME | env=NAME | --config FILE] [--key=value ...]

    The configuration is config/config.json or config.json of this folder; env=NAME takes config/NAME/config.json,
    example=NAME one that is shipped. With none of them the example omnigen-tiny is trained. Every option of the
    configuration can be given here as --key=value; `simpletuner options` lists them. --config takes a config.json, or
    the options file (.yml) of OmniGen2's own program.
    """
    loaded = load_words(context.args, say_for_all)
    words = [word for word in sys.argv[1:] if word != "--monitor"]
    with monitored(loaded) if monitor else nullcontext():
        run_in_processes(loaded, words)


@app.command(context_settings=PASS_ON, short_help="Explain options, or print those of this folder's run.")
def options(
    context: typer.Context,
    key: Annotated[str | None, typer.Argument(help="Explain this option.", show_default=False)] = None,
    search: Annotated[str | None, typer.Option(help="List options that mention this word.")] = None,
    resolved: Annotated[
        bool, typer.Option("--resolved", help="Print every option of this folder's run, its value and its origin.")
    ] = False,
    json_schema: Annotated[bool, typer.Option("--json-schema", help="Print a JSON Schema for editors.")] = False,
) -> None:
    """Explain the options of config.json and the keys of datasets: simpletuner options [KEY] [--search WORD]
    [--resolved] [--json-schema]

    `options multidatabackend --json-schema` prints the schema of the data file.

    --resolved also takes example=NAME, env=NAME and --key=value, as `train` does.
    """
    from simpletuner.config.reference import run_options_command

    if key and "=" in key:  # example=NAME or env=NAME, which typer cannot tell from a key
        context.args.insert(0, key)
        key = None
    if resolved:
        from simpletuner.launch import load_arguments

        run = load_arguments(context.args, os.environ, Path.cwd(), print_to_stderr, check_files=False)
        say(run_options_command(resolved=run))
        return
    if context.args:
        raise ConfigError(
            Problem(
                f'"{context.args[0]}" is not understood here', allowed="KEY, --search WORD, --resolved, --json-schema"
            )
        )
    say(run_options_command(key=key, search=search, json_schema=json_schema))


@app.command(context_settings=PASS_ON, short_help="Check configuration and data before training.")
def check(
    context: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder of the contact sheet; OUTPUT_DIR/check if not given.", show_default=False),
    ] = None,
    images: Annotated[
        int, typer.Option("--images", "--pictures", help="Of each dataset on the contact sheet.", min=1, max=500)
    ] = 21,
) -> None:
    """Show what a run would see of its data: simpletuner check [as for train]

    Prints what becomes of the files, sizes, steps, captions and caches, and shows the real crops with their captions
    as contact_sheet.png and check.html.
    """
    loaded = load(context)
    from simpletuner.commands.check import check as run_check

    run_check(loaded, say, output, images)


@app.command(context_settings=PASS_ON, short_help="Memory, time and disk of a run before it starts.")
def plan(
    context: typer.Context,
    probe: Annotated[
        bool | None,
        typer.Option(
            "--probe/--no-probe", help="Time real steps; if not given, where that is cheap.", show_default=False
        ),
    ] = None,
    device_memory: Annotated[float | None, typer.Option(help=DEVICE_MEMORY_HELP, min=1, show_default=False)] = None,
) -> None:
    """Say what a run needs: simpletuner plan [as for train]

    Memory comes from the shapes of the model, which needs no accelerator; time from a few real steps.
    """
    loaded = load(context)
    from simpletuner.commands.plan import plan as run_plan

    run_plan(loaded, say, probe, None if device_memory is None else round(device_memory * GIB))


@app.command(context_settings=PASS_ON, short_help="Write a configuration, with a wizard or from options.")
@takes(Given)
def configure(context: typer.Context, given: Given) -> None:
    """Make or edit config.json and multidatabackend.json: simpletuner configure [env=NAME] [--goal ... --data ...]

    Without options, screens ask for everything; with them, the same files are written at once. --key=value sets any
    option of the run. In files that exist only what changes is rewritten.
    """
    from simpletuner.wizard import command

    given = replace(given, arguments=tuple(context.args))
    config_file = command.run_configure(given, os.environ, Path.cwd(), say)
    if config_file is not None:
        from simpletuner.launch import load_arguments

        loaded = load_arguments((), os.environ, Path.cwd(), say, config_file)
        os.environ["CONFIG_PATH"] = str(config_file)  # for further processes, whose command is `train`
        run_in_processes(loaded, ["train"])


@app.command(short_help="Check this machine and installation.")
def doctor() -> None:
    """Say what would stand in the way of training, with the remedy; the exit code is 2 where something does."""
    from simpletuner.commands.doctor import doctor as run_doctor

    raise typer.Exit(run_doctor(os.environ, Path.cwd(), say))


@app.command(
    "verify-resume",
    context_settings=PASS_ON,
    short_help="Test that a killed and resumed run is bit-identical.",
)
def verify_resume(
    context: typer.Context,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.", min=6)] = 6,
    run: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Train a few steps twice, once killed and resumed, and compare every bit: simpletuner verify-resume [as for train]

    Both runs start from a copy of output_dir, in a folder beside it, which is removed; caches are used and filled as by
    `train`. The exit code is 1 where something differs.
    """
    if run is not None:  # a process of the proof
        from simpletuner.commands.verify_resume import prepared_run

        short = prepared_run(run, lambda words: load_words(words, say_for_all))
        run_in_processes(short, sys.argv[1:])
        return
    loaded = load(context)
    from simpletuner.training.preflight import check_model_folder

    check_model_folder(loaded)
    from simpletuner.commands.verify_resume import verify_resume as run_verify_resume

    if not run_verify_resume(loaded, context.args, steps, say):
        raise typer.Exit(1)
