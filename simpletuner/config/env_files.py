"""`config.env` beside a `config.json`: variables for the run and its libraries, set before anything is read.

Where there is no other configuration, `config.env` is the configuration itself (`layers.py`), and nothing is done here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from simpletuner.config.discovery import ENVIRONMENT_NAMES
from simpletuner.config.layers import read_env_variables

FILE = "config.env"


def variables_of_files(environment: Mapping[str, str], working_dir: Path, name: str | None = None) -> dict[str, str]:
    """What `config/config.env`, then `config/NAME/config.env` set and the environment does not.

    Args:
        name: of the configuration, as the command line chooses it; None: `ENV` and its like say it.

    Raises:
        ConfigError: a file cannot be read, or a line is no assignment.
    """
    found = _read(working_dir / "config", working_dir, environment)
    for key in ENVIRONMENT_NAMES:
        name = name or environment.get(key) or found.get(key)
    if name and name != "default":
        found |= _read(working_dir / "config" / name, working_dir, {**environment, **found})
    return {key: value for key, value in found.items() if key not in environment}


def _read(folder: Path, working_dir: Path, environment: Mapping[str, str]) -> dict[str, str]:
    file = folder / FILE
    others = (folder / "config.json", folder / "config.toml")
    if not file.is_file() or not any(other.is_file() for other in others):
        return {}
    variables = read_env_variables(file, str(file.relative_to(working_dir)), environment)
    return {name: value for name, (value, _) in variables.items()}
