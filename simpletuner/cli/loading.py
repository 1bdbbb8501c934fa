"""How a verb finds its run."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from simpletuner.cli.imports import run_of_options
from simpletuner.cli.shared import print_to_stderr

if TYPE_CHECKING:
    from simpletuner.config.loading import LoadedRun


def load(context: typer.Context) -> LoadedRun:
    """The run that the command line of a verb means; stdout is left to what was asked for."""
    return load_words(context.args, print_to_stderr)


def load_words(words: Sequence[str], say: Callable[[str], None]) -> LoadedRun:
    """The run that example=NAME, env=NAME, --config FILE and --key=value mean."""
    from simpletuner.launch import load_arguments

    arguments, config_file = run_of_options(words, os.environ, Path.cwd(), say)
    return load_arguments(arguments, os.environ, Path.cwd(), say, config_file)
