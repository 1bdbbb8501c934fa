"""The command line. Everything heavy is imported inside the verb that needs it, so that `--help` answers at once."""

from __future__ import annotations

# Verbs register themselves when they are imported; `--help` lists them in this order.
from simpletuner.cli import cache, diffsynth, examples, firered, imports, runs, watching, weights  # noqa: F401
from simpletuner.cli.program import main
from simpletuner.cli.shared import app

__all__ = ["app", "main"]
