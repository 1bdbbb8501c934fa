"""What the verbs share: the program, the processes of a run, where a verb speaks."""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_origin, get_type_hints

import typer

from simpletuner.importing import collector_off
from simpletuner.program import pasteable
from simpletuner.text import for_terminal

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from simpletuner.config.loading import LoadedRun

# Options of a run are declared in config/, not here: what typer does not know is passed on as it was typed.
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}

Options = TypeVar("Options", bound="DataclassInstance")

LOG_LEVEL = "SIMPLETUNER_LOG_LEVEL"

app = typer.Typer(
    name="simpletuner",
    help="Train image diffusion models: LoKr, LoRA and full fine-tuning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # or "[example=NAME]" would be taken for markup
    context_settings={"help_option_names": ["-h", "--help"]},
)


def takes(options: type[Options]) -> Callable[[Callable[[typer.Context, Options], None]], Callable[..., None]]:
    """Let a verb take the fields of a dataclass as its options; it is called with one object of them.

    A field whose type is `Annotated[..., typer.Option(...)]` is an option of the command line, any other one is not.
    """
    hints = get_type_hints(options, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)]
    for each in fields(options):
        if get_origin(hints[each.name]) is Annotated:
            parameters.append(inspect.Parameter(each.name, kind, default=each.default, annotation=hints[each.name]))

    def decorate(verb: Callable[[typer.Context, Options], None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def called(context: typer.Context, **given: Any) -> None:
            verb(context, options(**given))

        called.__annotations__ = {each.name: each.annotation for each in parameters}
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return called

    return decorate


def run_in_processes(loaded: LoadedRun, words: list[str]) -> None:
    """Train, in as many processes as the configuration says.

    Args:
        words: of the command line that starts each of them.
    """
    from simpletuner.distributed.launcher import is_main, is_started_already, launch
    from simpletuner.distributed.layout import layout_of
    from simpletuner.distributed.lifeline import hold_lifeline

    if not hold_lifeline(os.environ) and is_main(os.environ):  # else the launcher, or another process, looks
        check_surroundings(loaded)
    layout = layout_of(loaded.config.processes)
    if layout.world_size > 1 and not is_started_already(os.environ):
        raise typer.Exit(launch(words, layout, print_to_stderr))
    faulthandler.register(signal.SIGUSR1)  # prints where each thread is; the launcher passes it on

    with collector_off():
        from simpletuner.training.trainer import train as run_training

    run_training(loaded)


@contextmanager
def monitored(loaded: LoadedRun) -> Iterator[None]:
    """With a page that shows the run; only the process that was started by hand has one."""
    from simpletuner.distributed.launcher import is_main, is_started_already

    if is_started_already(os.environ) and not is_main(os.environ):
        yield
        return
    from simpletuner.commands.monitor import monitor_beside

    with monitor_beside(Path(loaded.config.checkpoint.output_dir)):
        yield


def check_surroundings(loaded: LoadedRun) -> None:
    """Look at the model's files, services and room before anything heavy is imported.

    Raises:
        ConfigError: the run cannot work with what is there.
    """
    with collector_off():
        from simpletuner.training.preflight import check_model_folder, check_services

    check_model_folder(loaded)
    for line in check_services(loaded, os.environ, Path.cwd()):
        print_to_stderr(f"warning: {line}")

    from simpletuner.training.disk_space import check_disk_space

    check_disk_space(loaded, os.environ)


def say(line: str) -> None:
    """To stdout; commands of this program can be pasted. What it quotes (captions, names of files) may hold control
    characters, which no terminal gets.
    """
    print(for_terminal(pasteable(line)), flush=True)


def print_to_stderr(line: str) -> None:
    """To stderr: stdout holds what was asked for, and nothing else. A terminal that is gone costs the line, and neither
    the run nor its exit code."""
    text = for_terminal(pasteable(line))
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr)


def say_for_all(line: str) -> None:
    """To stdout, by the process that speaks for all of a run."""
    from simpletuner.distributed.launcher import is_main
    from simpletuner.distributed.lifeline import LIFELINE

    if is_main(os.environ) and LIFELINE not in os.environ:  # else our launcher has said it
        say(line)
