"""Files of other training programs, read as runs of this one: `import`, and `train --config FILE.yml`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from simpletuner.cli.shared import PASS_ON, app, print_to_stderr, say
from simpletuner.errors import ConfigError, Problem

PROGRAMS = ("omnigen2", "diffsynth", "firered")
YAML = (".yml", ".yaml")
# What OmniGen2's own `train.py` takes beside its options file, and what this program adds to them.
_VALUES, _SWITCHES = ("config", "global_batch_size", "data_path"), ("skip_bad_rows",)


@app.command("import", context_settings=PASS_ON, short_help="Write the two JSON files from another program's options.")
def import_run(
    context: typer.Context,
    program: Annotated[str, typer.Argument(help="The program: omnigen2, diffsynth or firered.", show_default=False)],
    source: Annotated[
        Path,
        typer.Argument(
            help="Its options file (options/ft.yml); of diffsynth the model; of firered the command: sft.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the two files; config/NAME if not given.", show_default=False)
    ] = None,
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip_bad_rows", "--skip-bad-rows", help="Leave out rows that cannot be used.")
    ] = False,
) -> None:
    """Write config.json and multidatabackend.json: simpletuner import omnigen2 FILE.yml [--output FOLDER]

    simpletuner import diffsynth flux|kolors|sd3|hunyuan-dit FLAGS [--output FOLDER] takes the flags of that script.
    simpletuner import firered sft FLAGS [--output FOLDER] takes those of FireRed-Image-Edit, or its whole command that
    begins with accelerate launch.
    Every key is translated, or refused with its reason. `simpletuner train --config FILE.yml` does the same and trains.
    """
    import os

    from simpletuner.commands.omnigen2.run import Overrides, import_run
    from simpletuner.config.yaml_reader import read_yaml

    if program not in PROGRAMS:
        raise ConfigError(
            Problem(f'"{program}" is not a program whose files can be imported', allowed=", ".join(PROGRAMS))
        )
    if program == "diffsynth":
        from simpletuner.commands.diffsynth import run as scripts

        translation = scripts.translate(
            str(source), context.args, Path.cwd(), lambda rest: processes_of(rest, os.environ)
        )
        folder = output or Path("config") / f"diffsynth-{source}"
        say(str(scripts.import_run(translation, folder, print_to_stderr)))
        return
    if program == "firered":
        words = [str(source), *context.args, *(["--skip_bad_rows"] if skip_bad_rows else [])]
        say(str(_import_sft(words, output)))
        return
    name = read_yaml(source).values.get("name") or source.stem
    folder = output or Path("config") / str(name)
    processes = processes_of(context.args, os.environ)
    written = import_run(
        source, Path.cwd(), processes, print_to_stderr, Overrides(skips_bad_rows=skip_bad_rows), folder
    )
    say(str(written))


def _import_sft(words: Sequence[str], output: Path | None) -> Path:
    """Write what a command of FireRed-Image-Edit's sft amounts to; returns its `config.json`."""
    import os

    from simpletuner.commands.firered.launched import command_of
    from simpletuner.commands.firered.run import translate_command, write_configuration
    from simpletuner.launch import spec_of_name

    command = command_of(words)

    def processes(rest: Sequence[str]) -> int:
        own = [f"--{name}={value}" for name, value in command.options.items()]
        return processes_of([*own, *rest], os.environ)

    translation = translate_command(
        command.flags, {**os.environ, **command.variables}, Path.cwd(), spec_of_name, processes
    )
    for note in translation.notes:
        print_to_stderr(note)
    name = Path(translation.config["output_dir"]).name
    return write_configuration(translation, command.options, output or Path("config") / name, print_to_stderr)


def run_of_options(
    arguments: Sequence[str], environment: Mapping[str, str], working_dir: Path, say: Callable[[str], None]
) -> tuple[list[str], Path | None]:
    """(arguments of the run, its `config.json`) where `--config FILE` names a file; None where there is none.

    Raises:
        ConfigError: anything in the options file, or in the data that it names, that cannot be used.
    """
    found, rest = _taken(arguments)
    if "config" not in found:
        return list(arguments), None
    file = Path(found["config"])
    if file.suffix.lower() not in YAML:
        if len(found) > 1:
            others = ", ".join(f"--{name}" for name in found if name != "config")
            raise ConfigError(Problem(f"{others} belongs to an options file (.yml)", key="--config"))
        return rest, file
    from simpletuner.commands.omnigen2.run import Overrides, import_run

    size = found.get("global_batch_size")
    if size is not None and not size.isdecimal():
        raise ConfigError(Problem(f'"{size}" is not a whole number', key="--global_batch_size"))
    overrides = Overrides(int(size) if size else None, found.get("data_path"), "skip_bad_rows" in found)
    return rest, import_run(file, working_dir, processes_of(rest, environment), say, overrides)


def processes_of(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """The processes that a run with these arguments has, on all machines."""
    from simpletuner.config.layers import environment_layer, parse_arguments
    from simpletuner.config.merging import option_names
    from simpletuner.distributed.layout import visible_accelerators

    layers = (environment_layer(environment, option_names()), parse_arguments(arguments))
    given = {setting.key: setting.value for layer in layers for setting in layer.settings}
    counts = [given.get("num_processes") or max(visible_accelerators(), 1), given.get("num_machines") or 1]
    if not all(str(count).isdecimal() for count in counts):
        raise ConfigError(Problem(f'"{counts[0]}" and "{counts[1]}" are no numbers', key="num_processes, num_machines"))
    return int(counts[0]) * int(counts[1])


def _taken(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options of an options file with their values, and all other words."""
    found: dict[str, str] = {}
    rest: list[str] = []
    words = list(arguments)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_") if word.startswith("--") else ""
        if name in _SWITCHES and not equals:
            found[name] = ""
        elif name in _VALUES:
            if not equals and not words:
                raise ConfigError(Problem("it needs a value", key=f"--{name}"))
            found[name] = value if equals else words.pop(0)
        else:
            rest.append(word)
    return found, rest
