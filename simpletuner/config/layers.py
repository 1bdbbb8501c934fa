"""The layers of a configuration: settings as they are written in a file, the environment, and the command line.

A setting keeps its raw value and where it comes from. Nothing is checked here but the form of each source.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simpletuner.config.discovery import BACKEND_NAMES, ENVIRONMENT_NAMES, ConfigSource
from simpletuner.config.json_reader import parse_json, read_text_file
from simpletuner.config.names import ENV_FILE_NAMES, EXTRA_ARGUMENTS
from simpletuner.errors import ConfigError, Problem
from simpletuner.spelling import nearest
from simpletuner.text import lines_of

OriginKind = Literal["default", "family", "file", "environment", "command line", "memory"]

ENVIRONMENT_PREFIX = "SIMPLETUNER_"
# Between the processes of one run.
INTERNAL = ("SIMPLETUNER_LIFELINE", "SIMPLETUNER_LAST_WORDS", "SIMPLETUNER_LISTENER")
# Variables of that prefix that are not options: they choose files, or serve other parts of the program.
OTHER_VARIABLES = frozenset(
    {
        *(*ENVIRONMENT_NAMES, *BACKEND_NAMES, "SIMPLETUNER_DEBUG", "SIMPLETUNER_LOG_LEVEL"),
        *("SIMPLETUNER_JOB_ID", "SIMPLETUNER_MONITOR_TOKEN", *INTERNAL),
    }
)

# Variables of launchers that mean an option; the more common name last, which wins.
LAUNCH_VARIABLES: Mapping[str, str] = {
    "TRAINING_NUM_PROCESSES": "num_processes",
    "TRAINING_NUM_MACHINES": "num_machines",
    "MACHINE_RANK": "machine_rank",
    "NODE_RANK": "machine_rank",
    "MASTER_ADDR": "main_process_ip",
    "MASTER_PORT": "main_process_port",
    "MIXED_PRECISION": "mixed_precision",
    "TRAINING_DYNAMO_BACKEND": "dynamo_backend",
}

# Variables of scripts that call `accelerate launch`, which is not called here.
ACCELERATE_VARIABLES = ("ACCELERATE_EXTRA_ARGS", "ACCELERATE_CONFIG_PATH")

_REFERENCE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
# Text in double quotes, in single quotes (where a shell replaces nothing), or without quotes.
_QUOTED = re.compile(r""""(?:[^"\\]|\\.)*"|'[^']*'|[^"']+|["']""")
_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?(\w+)(\+?=)(.*)$")


@dataclass(frozen=True)
class Origin:
    """Where a value comes from.

    Args:
        kind: the layer.
        file: for `file`: its name as shown; for `environment`: the variable.
        line: 1-based line in the file.
    """

    kind: OriginKind
    file: str | None = None
    line: int | None = None

    def __str__(self) -> str:
        if self.kind == "file":
            return f"{self.file}:{self.line}" if self.line else f"{self.file}"
        return f"environment ({self.file})" if self.kind == "environment" else self.kind

    def problem(self, message: str, key: str, allowed: str | None = None, fix: str | None = None) -> Problem:
        """A problem with the value that comes from here."""
        if self.kind == "file":
            return Problem(message, key=key, file=self.file, line=self.line, allowed=allowed, fix=fix)
        place = {
            "environment": f"environment variable {self.file}",
            "command line": "command line",
            "family": "family defaults",
            "memory": "chosen by memory",
            "default": None,
        }
        return Problem(message, key=key, file=place[self.kind], allowed=allowed, fix=fix)


@dataclass(frozen=True)
class Setting:
    """One key as it was written, without leading dashes, with its raw value."""

    key: str
    value: Any
    origin: Origin


@dataclass(frozen=True)
class Layer:
    """What one source says; `warnings` are about its form."""

    settings: Sequence[Setting]
    warnings: Sequence[str] = ()


def clean_key(key: str) -> str:
    """`--learning-rate` and `learning_rate` are the same option."""
    return key.lstrip("-").replace("-", "_")


def read_file_layer(source: ConfigSource, shown: str, known: Collection[str], environment: Mapping[str, str]) -> Layer:
    """The settings of a configuration file.

    Args:
        shown: the file's name in errors.
        known: every name that means an option; a `config.env` file may set other variables too.
        environment: what `$NAME` in a `config.env` file may stand for.

    Raises:
        ConfigError: the file cannot be read or is not what its ending says.
    """
    if source.path is None:
        return Layer([])
    if source.backend == "env":
        return _read_env(source.path, shown, known, environment)
    if source.backend == "toml":
        return _read_toml(source.path, shown)
    return json_layer(read_text_file(source.path, shown), shown)


def json_layer(text: str, shown: str) -> Layer:
    """The settings of a JSON text; `shown` names it in errors.

    Raises:
        ConfigError: it is not a JSON object, or sets a key twice.
    """
    document = parse_json(text, shown)
    if not isinstance(document.value, dict):
        message = f"holds a {_kind_of(document.value)} where an object with options was expected"
        fix = "this looks like a list of datasets: name it in data_backend_config" if document.value else None
        raise ConfigError(Problem(message, file=shown, line=1, allowed='{"option": value, ...}', fix=fix))
    settings: list[Setting] = []
    extra: list[Setting] = []
    warnings: list[str] = []
    seen: dict[str, str] = {}
    for key, value in document.value.items():
        origin = Origin("file", shown, document.line(key))
        name = clean_key(key)
        if name == "$schema":
            continue
        if name in seen:
            raise ConfigError(origin.problem(f'is given twice, as "{seen[name]}" and as "{key}"', key=name))
        seen[name] = key
        if name == EXTRA_ARGUMENTS:
            warnings.append(f'{origin}: {name}: in JSON, add each option as a key of its own: "--option": value')
            extra += _extra_arguments(str(value or ""), origin)
        else:
            settings.append(Setting(name, value, origin))
    return Layer([*settings, *extra], warnings)


def _kind_of(value: Any) -> str:
    return {list: "list", str: "text", bool: "truth value", type(None): "null"}.get(type(value), "number")


def _read_toml(path: Path, shown: str) -> Layer:
    text = read_text_file(path, shown)
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"at line (\d+)", str(error))
        raise ConfigError(
            Problem(f"is not TOML: {error}", file=shown, line=int(found.group(1)) if found else None)
        ) from error
    if not values:
        raise ConfigError(Problem("the file is empty", file=shown, allowed="option = value"))
    lines = {
        clean_key(match.group(1)): number
        for number, line in enumerate(lines_of(text), 1)
        if (match := re.match(r'\s*"?([\w-]+)"?\s*=', line))
    }
    return Layer(
        [
            Setting(clean_key(key), value, Origin("file", shown, lines.get(clean_key(key))))
            for key, value in values.items()
        ]
    )


def _read_env(path: Path, shown: str, known: Collection[str], environment: Mapping[str, str]) -> Layer:
    settings: list[Setting] = []
    extra: list[Setting] = []
    warnings: list[str] = []
    for name, (value, origin) in read_env_variables(path, shown, environment).items():
        option = env_file_option(name)
        if name == EXTRA_ARGUMENTS:
            extra += _extra_arguments(value, origin)
        elif option in known or nearest(option, known):
            settings.append(Setting(option, value, origin))
        else:
            warnings.append(f"{origin}: {name} names no option and is not read")
    return Layer([*settings, *extra], warnings)


def read_env_variables(path: Path, shown: str, environment: Mapping[str, str]) -> dict[str, tuple[str, Origin]]:
    """`NAME=value` lines as a shell reads them: quotes, comments, `export`, `+=`, `$NAME`; no commands are run.

    Args:
        environment: where `$NAME` is looked up that the file does not set before; unset ones are empty.

    Raises:
        ConfigError: the file cannot be read, or a line is no assignment.
    """
    variables: dict[str, tuple[str, Origin]] = {}
    seen = dict(environment)
    for number, line in enumerate(lines_of(read_text_file(path, shown)), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        origin = Origin("file", shown, number)
        match = _ASSIGNMENT.match(line)
        if not match:
            raise ConfigError(
                Problem(f'"{line.strip()}" is not an assignment', file=shown, line=number, allowed="NAME=value")
            )
        name, operator, text = match.groups()
        value = _shell_value(text, seen, origin, name)
        if operator == "+=" and name in variables:
            value = variables[name][0] + value
        variables[name] = (value, origin)
        seen[name] = value
    return variables


def referenced_names(path: Path, shown: str) -> set[str]:
    """The variables that a `config.env` file refers to as `$NAME`."""
    return {first or second for first, second in _REFERENCE.findall(read_text_file(path, shown))}


def env_file_option(name: str) -> str:
    """The option that a variable of a `config.env` file sets."""
    bare = name.removeprefix(ENVIRONMENT_PREFIX)
    return ENV_FILE_NAMES.get(bare, bare.lower())


def _shell_value(text: str, known: Mapping[str, str], origin: Origin, name: str) -> str:
    if "$(" in text or "`" in text:
        raise ConfigError(origin.problem("holds a command, which is not run", key=name, fix="write the value itself"))
    parts = [
        part if part.startswith("'") else _REFERENCE.sub(lambda found: known.get(found[1] or found[2], ""), part)
        for part in _QUOTED.findall(text)
    ]
    text = "".join(parts)
    try:
        return " ".join(shlex.split(text, comments=True))
    except ValueError as error:
        raise ConfigError(_unbalanced(origin, name, error)) from error


def _extra_arguments(text: str, origin: Origin) -> list[Setting]:
    """Options in `TRAINER_EXTRA_ARGS`; as at the end of a command line, they win over the file's own.

    Raises:
        ConfigError: they are no options.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(_unbalanced(origin, EXTRA_ARGUMENTS, error)) from error
    return list(parse_arguments(words, origin).settings)


def _unbalanced(origin: Origin, name: str, error: ValueError) -> Problem:
    return origin.problem(f"has unbalanced quotes ({error})", key=name, fix="close each quote")


def environment_layer(environment: Mapping[str, str], known: Iterable[str]) -> Layer:
    """`SIMPLETUNER_<OPTION>` variables, and `TRAINER_EXTRA_ARGS`. Others of that prefix may be another program's: a
    warning says that they are not read.

    Args:
        known: every name that means an option, old names included.

    Raises:
        ConfigError: a variable is named almost like an option.
    """
    names = set(known)
    settings, warnings, problems = [], [], []
    for variable, value in sorted(environment.items()):
        if not variable.startswith(ENVIRONMENT_PREFIX) or variable in OTHER_VARIABLES:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name in names:
            settings.append(Setting(name, value, Origin("environment", variable)))
        elif near := nearest(name, names):
            origin = Origin("environment", variable)
            fix = f'did you mean "{ENVIRONMENT_PREFIX}{near.upper()}"?'
            problems.append(origin.problem("there is no option of this name", key=name, fix=fix))
        else:
            warnings.append(f"environment variable {variable}: names no option and is not read")
    if problems:
        raise ConfigError(problems)
    if environment.get(EXTRA_ARGUMENTS):
        settings += _extra_arguments(environment[EXTRA_ARGUMENTS], Origin("environment", EXTRA_ARGUMENTS))
    for variable in ACCELERATE_VARIABLES:
        if environment.get(variable):
            warnings.append(f"environment variable {variable}: is not read: simpletuner starts the processes itself")
    for variable, option in LAUNCH_VARIABLES.items():
        if environment.get(variable, "").strip():
            settings.append(Setting(option, environment[variable], Origin("environment", variable)))
    return Layer(settings, warnings)


def parse_arguments(arguments: Sequence[str], origin: Origin | None = None) -> Layer:
    """`--key=value`, `--key value`, and `--flag` alone, which means true. A repeated key: the last one counts.

    Raises:
        ConfigError: an argument that is none of these.
    """
    origin = origin or Origin("command line")
    settings: list[Setting] = []
    problems: list[Problem] = []
    value: str | bool
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        key, equals, value = argument.partition("=")
        if not re.fullmatch(r"--[A-Za-z][\w.-]*", key):
            problems.append(origin.problem(f'"{argument}" is not an option', key=argument, allowed="--option=value"))
            continue
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else True
        settings.append(Setting(clean_key(key), value, origin))
    if problems:
        raise ConfigError(problems)
    return Layer(settings)
