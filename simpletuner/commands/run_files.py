"""The JSON files that a command of another program becomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.config.foreign_keys import RENAMED
from simpletuner.config.layers import parse_arguments
from simpletuner.config.options import all_options
from simpletuner.errors import ConfigError, Problem
from simpletuner.text import read_json_text

CONFIG, DATA = "config.json", "multidatabackend.json"


def write_run_files(folder: Path, texts: Mapping[str, str], replaces: bool) -> None:
    """Write each file whose text is another one than before.

    Args:
        replaces: existing files are overwritten.

    Raises:
        ConfigError: one is there, and is not to be replaced.
    """
    there = [] if replaces else [name for name in texts if (folder / name).exists()]
    if there:
        message = f"{folder} has {' and '.join(there)} already"
        raise ConfigError(Problem(message, key="--output", fix="name another folder, or move the files away"))
    for name, text in texts.items():
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text:
            folder.mkdir(parents=True, exist_ok=True)
            storage.write_bytes(folder / name, text.encode())


def options_of(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(options of this program as JSON has them, words of those that are secrets)."""
    known = all_options()
    given, secrets = {}, []
    for setting in parse_arguments(words).settings:
        key = RENAMED.get(setting.key, setting.key)
        if key in known and known[key].is_secret:
            secrets.append(f"--{key}={setting.value}")
        else:
            given[key] = _plain(setting.value)
    return given, secrets


def _plain(value: Any) -> Any:
    """A number or truth value of a command line as JSON has it; other texts as they are."""
    try:
        found = read_json_text(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return found if isinstance(found, bool | int | float) else value
