"""Verbs of FireRed-Image-Edit's training: embeddings first, then a run that reads them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from simpletuner.cli.shared import PASS_ON, app, print_to_stderr, run_in_processes, say, say_for_all

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily

# The flags are those of other programs, with a help of their own.
_OWN_HELP = PASS_ON | {"help_option_names": []}


@app.command("extract-vlm-embeds", context_settings=_OWN_HELP, short_help="Encode the instructions of edits to files.")
def extract_vlm_embeds(context: typer.Context) -> None:
    """Encode the rows of a .jsonl file by a vision-language model; see --help."""
    from simpletuner.commands.firered.extract import extract
    from simpletuner.commands.firered.extract_flags import parse_extract
    from simpletuner.distributed.process_group import process_group_of

    flags = parse_extract(context.args)
    group = process_group_of(os.environ)

    def load_family() -> ModelFamily:
        import torch

        from simpletuner.launch import family_of_model

        if torch.cuda.is_available():
            torch.cuda.set_device(group.local_rank % torch.cuda.device_count())
        # Text to image has a template of its own, whichever model reads it.
        return family_of_model(flags.model_path, "qwen_image" if flags.t2i_mode else None)

    say(str(extract(flags, Path.cwd(), group.rank, group.size, load_family, print_to_stderr)))


@app.command(context_settings=_OWN_HELP, short_help="Train by the flags of FireRed-Image-Edit's sft.")
def sft(context: typer.Context) -> None:
    """Train from the files of extract-vlm-embeds; see --help."""
    from simpletuner.commands.firered.run import load_sft
    from simpletuner.launch import spec_of_name

    loaded = load_sft(context.args, os.environ, Path.cwd(), say_for_all, spec_of_name, processes_of_run)
    run_in_processes(loaded, sys.argv[1:])


def processes_of_run(words: Sequence[str]) -> int:
    """The processes of a run, on all machines: those that a launcher has started, or those that its options mean."""
    from simpletuner.cli.imports import processes_of
    from simpletuner.distributed.launcher import is_started_already

    return int(os.environ["WORLD_SIZE"]) if is_started_already(os.environ) else processes_of(words, os.environ)
