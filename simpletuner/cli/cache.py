"""`simpletuner cache`: build, verify, prune, count."""

from __future__ import annotations

from typing import Annotated

import typer

from simpletuner.cli.loading import load
from simpletuner.cli.shared import PASS_ON, app, say
from simpletuner.errors import EXIT_DATA

cache_app = typer.Typer(
    help="Build, verify, prune or count the caches of a configuration.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(cache_app, name="cache", short_help="Build, verify, prune or count caches.")


@cache_app.command("build", context_settings=PASS_ON)
def build_cache(context: typer.Context) -> None:
    """Encode what is missing, as `train` does before its first step: simpletuner cache build [as for train]"""
    loaded = load(context)
    from simpletuner.commands import cache

    cache.build(loaded)


@cache_app.command("verify", context_settings=PASS_ON)
def verify_cache(context: typer.Context) -> None:
    """Read every entry and compare it with its sha256; damaged ones are moved to quarantine, and the exit code is 3."""
    loaded = load(context)
    from simpletuner.commands import cache

    if cache.verify(loaded, say):
        raise typer.Exit(EXIT_DATA)


@cache_app.command("prune", context_settings=PASS_ON)
def prune_cache(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    others: Annotated[
        bool, typer.Option("--others", help="Also empty cache folders that no dataset of this configuration uses.")
    ] = False,
) -> None:
    """Remove entries that no configured dataset uses, and damaged files in quarantine."""
    loaded = load(context)
    from simpletuner.commands import cache

    cache.prune(loaded, say, dry_run, others)


@cache_app.command("stats", context_settings=PASS_ON)
def count_cache(context: typer.Context) -> None:
    """Say what the caches hold, how much of it is in use, and what is still to be encoded."""
    loaded = load(context)
    from simpletuner.commands import cache

    cache.stats(loaded, say)
