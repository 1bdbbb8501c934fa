"""`report.html`: a run explained in one file that opens in any browser, needs no network and runs no script.

It is made from the files of an output folder alone, so `simpletuner report` makes it for any old run.
"""

from __future__ import annotations

from pathlib import Path

from simpletuner import storage
from simpletuner.reporting.report.record import read_run
from simpletuner.reporting.report.view import view_of
from simpletuner.templating import render, to_bytes

REPORT_FILE = "report.html"


def write_report(output_dir: Path, destination: Path | None = None) -> Path:
    """Write the report of the run in `output_dir`; returns its path.

    Raises:
        DataError: there is no run in the folder, or the disk is full.
    """
    path = destination or output_dir / REPORT_FILE
    storage.write_bytes(path, to_bytes(render("report.html", **view_of(read_run(output_dir)))))
    return path
