"""The JSON files that a command of another program becomes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from simpletuner import storage
from simpletuner.errors import ConfigError, Problem

CONFIG, DATA = "config.json", "multidatabackend.json"


def write_run_files(folder: Path, texts: Mapping[str, str], replaces: bool) -> None:
    """Write each file whose text is another one than before.

    Args:
        replaces: files that are there are written anew.

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
