"""The examples that are shipped with the package: whole runs with model, data and configuration, ready to train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.spelling import did_you_mean

DEFAULT_EXAMPLE = "omnigen-tiny"


def example_names() -> list[str]:
    """Names of the shipped examples, sorted."""
    return sorted(path.parent.name for path in _root().glob("*/config.json"))


def example_dir(name: str) -> Path:
    """The folder of an example.

    Raises:
        ConfigError: there is none of that name; suggests the nearest.
    """
    if name not in example_names():
        from simpletuner.examples.presets import presets

        known = [*example_names(), *(preset[0] for preset in presets())]
        allowed = f"{', '.join(example_names())}, and the presets of `simpletuner examples list`"
        message = f'there is no example "{name}"'
        raise ConfigError(Problem(message, key="example", allowed=allowed, fix=did_you_mean(name, known)))
    return _root() / name


def example_summary(name: str) -> str:
    """One line on what an example trains, from its configuration."""
    config = json.loads((example_dir(name) / "config.json").read_text(encoding="utf-8"))
    what = config["lora_type"] if config["model_type"] == "lora" else "full"
    return f"{config['model_family']}, {what}, {config['max_train_steps']} steps"


def copy_example(name: str, destination: Path) -> Path:
    """Copy an example or write a preset (`presets.py`) to a folder of one's own, which must not exist or be empty.

    Raises:
        ConfigError: unknown name, or the folder holds something.
        DataError: it cannot be written.
    """
    from simpletuner.config.reference import schema_text
    from simpletuner.examples.presets import write_preset

    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ConfigError(
            Problem(
                f"{destination} already holds something; nothing was copied",
                allowed="a new or empty folder",
                fix="name another folder, or empty this one",
            )
        )
    try:
        if not write_preset(name, destination):
            source = example_dir(name)
            shutil.copytree(source, destination, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
        # What "$schema" of a copy names: editors then complete and check what is changed in it.
        (destination / "config.schema.json").write_text(schema_text("config") + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(Problem(f"cannot copy the example to {destination}: {error}")) from error
    return destination


def _root() -> Path:
    return Path(__file__).resolve().parent
