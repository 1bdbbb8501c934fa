"""How the program begins and ends: `main` alone reads `sys.argv` and turns errors into exit codes."""

from __future__ import annotations

import io
import itertools
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from simpletuner import __version__
from simpletuner.allocation import keep_freed_memory
from simpletuner.cli.shared import LOG_LEVEL, app, print_to_stderr
from simpletuner.disk import disk_error
from simpletuner.errors import EXIT_INTERRUPTED, ConfigError, Problem, SimpleTunerError
from simpletuner.quiet import hide_needless_lines


def main() -> None:
    """Run the command line; errors that a user can fix print without a traceback."""
    hide_needless_lines()
    keep_freed_memory()
    _prepare_streams()
    try:
        require_system(sys.platform)
        app()
    except SimpleTunerError as error:
        if os.environ.get("SIMPLETUNER_DEBUG") == "1" and error.__cause__ is not None:
            traceback.print_exc()  # what a disk refused may have been asked of it by a mistake of ours
        _report_end(error.render())
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print_to_stderr("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:  # the last boundary: says what happened and ends the program
        if os.environ.get("SIMPLETUNER_DEBUG") == "1":
            raise
        if reported := disk_error(error):
            _report_end(reported.render())
            sys.exit(reported.exit_code)
        _report_end(_report_unexpected(error))
        sys.exit(1)
    finally:
        _let_go_of_streams()


def require_system(platform: str) -> None:
    """Raise on a system where a run could not be ended, resumed or watched as promised.

    Raises:
        ConfigError: on Windows, which has neither the signals nor the inherited pipes that runs depend on.
    """
    if platform == "win32":
        fix = "run it in WSL2, which sees the GPU through the Windows driver (INSTALL.md, Windows)"
        raise ConfigError(Problem("simpletuner runs on Linux and macOS, not on Windows itself", fix=fix))


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(f"simpletuner {__version__}")
        raise typer.Exit
    _prepare_environment()


def _prepare_environment() -> None:
    """Set what `config.env` beside a configuration sets, and the level of what libraries log."""
    from simpletuner.config.env_files import variables_of_files
    from simpletuner.distributed.launcher import forget_machine_numbers

    forget_machine_numbers(os.environ)
    name = next((word.removeprefix("env=") for word in sys.argv if word.startswith("env=")), None)
    try:
        here = Path.cwd()
    except FileNotFoundError:
        fix = "change into a folder that is there (cd)"
        raise ConfigError(Problem("the working folder of this shell was deleted", fix=fix)) from None
    found = variables_of_files(os.environ, here, name)
    os.environ.update(found.variables)
    for line in found.warnings:
        print_to_stderr(f"warning: {line}")
    if written := os.environ.get(LOG_LEVEL):
        import logging

        level = logging.getLevelNamesMapping().get(written.strip().upper())
        if level is None:
            allowed = "debug, info, warning, error, critical"
            raise ConfigError(Problem(f'"{written}" is not a log level', key=LOG_LEVEL, allowed=allowed))
        logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s")


def _report_end(text: str) -> None:
    """To stderr; one of several processes tells its launcher, which prints it for all."""
    from simpletuner.distributed.launcher import leave_last_words

    if not leave_last_words(text, os.environ):
        print_to_stderr(text)


def _prepare_streams() -> None:
    """Open those of stdin, stdout and stderr that a service started this program without: the next file that is opened
    would get the number, and whatever a library prints would be written into it. What stdout's encoding has no letters
    for is shown with escapes, as Python does on stderr.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _let_go_of_streams() -> None:
    """`simpletuner train | head` ends as the run did: otherwise Python's own flush at exit fails with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # EPIPE, or EIO of a terminal that is gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _report_unexpected(error: Exception) -> str:
    """Keep the traceback in a file and name it in one line: it is a fault of ours, not of the user's."""
    import tempfile

    text = "".join(traceback.format_exception(error))
    summary = f"unexpected {type(error).__name__}: {error}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="simpletuner-error-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"simpletuner {__version__}, {_command_line(sys.argv)}\n\n{text}")
    except OSError:
        return f"{summary}\n{text}"
    return f"{summary}\n  the traceback is in {file.name}; please report it with your configuration"


def _command_line(arguments: list[str]) -> str:
    """The command as it was given, without the values of options: one may be a token."""
    shown = [Path(arguments[0]).name]
    for before, argument in itertools.pairwise(arguments):
        name, equals, _ = argument.partition("=")
        is_value = before.startswith("--") and "=" not in before and not argument.startswith("--")
        shown.append("..." if is_value else f"{name}=..." if equals and name.startswith("--") else argument)
    return " ".join(shown)
