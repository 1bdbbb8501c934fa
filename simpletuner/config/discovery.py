"""Which configuration file a start uses: `CONFIG_PATH`, `ENV`, `CONFIG_BACKEND`, or the file in its usual place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from simpletuner.config.nearby import nearest_path
from simpletuner.errors import ConfigError, Problem
from simpletuner.spelling import did_you_mean

Backend = Literal["json", "toml", "env", "cmd"]

ENVIRONMENT_NAMES = ("ENV", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT")
BACKEND_NAMES = ("SIMPLETUNER_CONFIG_BACKEND", "CONFIG_BACKEND", "CONFIG_TYPE")
_FILE_BACKENDS: tuple[Backend, ...] = ("json", "toml", "env")


@dataclass(frozen=True)
class ConfigSource:
    """The chosen file and its format; `path` is None where everything comes from the command line (`cmd`)."""

    path: Path | None
    backend: Backend


def find_config(environment: Mapping[str, str], working_dir: Path) -> ConfigSource | None:
    """The configuration file to read, or None where nobody chose one and none is in its usual place.

    Raises:
        ConfigError: a chosen file, folder or format does not exist; lists the places that were tried.
    """
    backend = _chosen_backend(environment)
    if backend == "cmd":
        return ConfigSource(None, "cmd")
    if environment.get("CONFIG_PATH"):
        return _from_path(environment["CONFIG_PATH"], backend, working_dir)
    name_key = next((name for name in ENVIRONMENT_NAMES if environment.get(name)), None)
    # POSIX shells know ENV too, as the path of a start-up file: that is not the name of a configuration.
    if name_key and not (name_key == "ENV" and Path(environment[name_key]).is_file()):
        return _from_environment_name(name_key, environment[name_key], backend, working_dir)
    places = usual_places(working_dir, backend)
    found = next((path for path in places if path.is_file()), None)
    if found is None and backend:
        raise _not_found(f'CONFIG_BACKEND is "{backend}", and there is no configuration file of that kind', places)
    return ConfigSource(found, _backend_of(found)) if found else None


def usual_places(working_dir: Path, backend: Backend | None = None) -> list[Path]:
    """Where a configuration is looked for when nobody says where it is."""
    return [
        folder / name
        for kind in ((backend,) if backend else _FILE_BACKENDS)
        for folder, name in ((working_dir / "config", f"config.{kind}"), (working_dir, f"config.{kind}"))
    ]


def named_configurations(working_dir: Path, pattern: str = "*") -> list[str]:
    """What `env=NAME` may mean here: the folders in `config/` that hold a configuration."""
    config = working_dir / "config"
    found = {path.parent for kind in _FILE_BACKENDS for path in config.glob(f"{pattern}/config.{kind}")}
    return sorted(folder.relative_to(config).as_posix() for folder in found)


def _chosen_backend(environment: Mapping[str, str]) -> Backend | None:
    name = next((name for name in BACKEND_NAMES if environment.get(name)), None)
    if name is None:
        return None
    value = environment[name].strip().lower()
    if value not in get_args(Backend):
        allowed = ", ".join(get_args(Backend))
        raise ConfigError(Problem(f'"{environment[name]}" is not a kind of configuration', key=name, allowed=allowed))
    return value  # type: ignore[return-value]


def _from_path(text: str, backend: Backend | None, working_dir: Path) -> ConfigSource:
    """`CONFIG_PATH`: a file, a file without its ending, or a folder."""
    path = working_dir / Path(text).expanduser()
    if path.is_file():
        return ConfigSource(path, backend or _backend_of(path))
    kinds = (backend,) if backend else _FILE_BACKENDS
    places = [Path(f"{path}.{kind}") for kind in kinds] + [path / f"config.{kind}" for kind in kinds]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        near = nearest_path(path)
        raise ConfigError(
            Problem(
                f'"{text}": there is no configuration file there',
                key="CONFIG_PATH",
                allowed="a configuration file, or a folder with " + " or ".join(f"config.{kind}" for kind in kinds),
                fix=f'did you mean "{os.path.relpath(near, working_dir)}"?' if near else None,
            )
        )
    return ConfigSource(found, _backend_of(found))


def _from_environment_name(key: str, name: str, backend: Backend | None, working_dir: Path) -> ConfigSource:
    """`ENV`: the name of a folder in `config/`, or a path; "default" is `config/` itself."""
    inside = "" if name == "default" else name
    folders = [working_dir / "config" / inside, working_dir / "examples" / inside, working_dir / inside]
    places = [folder / f"config.{kind}" for folder in folders for kind in ((backend,) if backend else _FILE_BACKENDS)]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        known = named_configurations(working_dir, "*") + named_configurations(working_dir, "*/*")
        message = f'"{name}": there is no configuration of this name'
        fix = did_you_mean(name, known) or f"make config/{name}/config.json, or leave {key} out"
        raise ConfigError(Problem(message, key=key, allowed=", ".join(known) or "default", fix=fix))
    return ConfigSource(found, _backend_of(found))


def _backend_of(path: Path) -> Backend:
    ending = path.suffix.lstrip(".").lower()
    return ending if ending in _FILE_BACKENDS else "json"


def _not_found(message: str, places: list[Path]) -> ConfigError:
    tried = ", ".join(dict.fromkeys(str(place) for place in places))
    return ConfigError(Problem(message, allowed=f"one of the places that were tried: {tried}"))


def no_config_error(working_dir: Path) -> ConfigError:
    """The error for a start without any configuration."""
    places = ", ".join(str(place) for place in usual_places(working_dir))
    return ConfigError(
        Problem(
            "there is no configuration file",
            allowed=f"one of the places that were tried: {places}",
            fix="copy config/config.json.example to config/config.json, or run an example: "
            "simpletuner train example=omnigen-tiny",
        )
    )
