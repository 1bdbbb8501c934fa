"""Verbs that show: a run on a page, a run that is over, the families."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from simpletuner.cli.shared import app, print_to_stderr, say


@app.command(short_help="One page that explains a run: report.html.")
def report(
    output_dir: Annotated[Path, typer.Argument(help="output_dir of a run; it may still be running.")],
    output: Annotated[
        Path | None, typer.Option(help="The file; OUTPUT_DIR/report.html if not given.", show_default=False)
    ] = None,
) -> None:
    """Write a run as one HTML file with everything in it: curves, images, data, configuration, commands.

    It is made from the files of the folder alone, and shows them in any browser, without a network.
    """
    from simpletuner.reporting.report import write_report

    say(str(write_report(output_dir, output)))


@app.command(short_help="Watch runs live on a page in the browser.")
def monitor(
    output_dir: Annotated[
        Path | None, typer.Argument(help="Follow this run, which needs no webhook.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Listen here; 0.0.0.0: for other machines too.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Listen here; 0: any that is free.", min=0, max=65535)] = 8642,
    token: Annotated[
        str | None,
        typer.Option(
            help="Token that senders and browsers must show. Generated if other machines can reach the page.",
            envvar="SIMPLETUNER_MONITOR_TOKEN",
            show_default=False,
        ),
    ] = None,
    until_eof: Annotated[bool, typer.Option("--until-eof", help="End when stdin does.", hidden=True)] = False,
) -> None:
    """Show runs as they learn: simpletuner monitor [OUTPUT_DIR] [--host HOST] [--port PORT] [--token TOKEN]

    Runs report to it through webhook_config; with OUTPUT_DIR it reads that run's metrics.jsonl instead.
    """
    from simpletuner.commands.monitor import monitor as run_monitor

    run_monitor(output_dir, host, port, token, say, until_eof)


@app.command(short_help="The model families: flavors, licenses, sizes, what each supports.")
def models(
    name: Annotated[str | None, typer.Argument(help="A family; without one all are listed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """List the model families that can be trained, those of other packages included."""
    from simpletuner.commands.models import show_models

    show_models(name, as_json, print if as_json else say, print_to_stderr)
