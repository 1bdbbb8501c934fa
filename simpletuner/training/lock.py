"""`run.lock.json`: what a run was made of, so that it can be made again, and a resume can tell what has changed.

Versions, the resolved configuration, and digests of configuration files, images and base weights. Digests of files
are remembered in the cache folder, so only the first start on a model reads its weights for them.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from simpletuner import __version__, storage
from simpletuner.config.loading import LoadedRun
from simpletuner.config.paths import SINGLE_FILE
from simpletuner.data.dataset import Dataset
from simpletuner.data.digests import DigestMemo
from simpletuner.errors import DataError, error_text
from simpletuner.families.spec import Component
from simpletuner.models.components import component_file
from simpletuner.models.family import ModelFamily
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice
from simpletuner.training.phases import phase

LOCK_FILE = "run.lock.json"
PACKAGES = (
    *("torch", "diffusers", "transformers", "tokenizers", "lycoris-lora", "safetensors", "numpy", "pillow"),
    *("accelerate", "peft", "optimum-quanto", "torchao", "bitsandbytes"),
)


def write_lock(
    loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset], output_dir: Path, bus: EventBus, resumes: bool
) -> None:
    """Write the lock into the output folder; a resumed run says what differs from its last start.

    Called when the weights are loaded: a model from the hub has its files only then.

    Raises:
        DataError: the lock cannot be written.
    """
    path = output_dir / LOCK_FILE
    with phase(bus, f"writing {LOCK_FILE}"):
        lock = make_lock(loaded, family, datasets)
    if resumes and path.is_file():
        for line in changes_since(path, lock):
            bus.emit(Notice("warning", line))
    storage.write_json(path, lock)


def make_lock(loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset]) -> dict[str, Any]:
    """The lock as JSON holds it."""
    with DigestMemo(Path(loaded.config.data.cache_dir) / "digests.sqlite") as memo:
        files = [path for path in config_files(loaded) if path.is_file()]
        return {
            "simpletuner": __version__,
            "python": platform.python_version(),
            "packages": dict(installed_versions()),
            "config": loaded.resolved(),
            "origins": {key: str(origin) for key, origin in loaded.origins.items()},
            "command": train_command(loaded),
            "config_files": {path.name: memo.digest(path) for path in files},
            "data": {each.id: {"pictures": each.num_images, "fingerprint": each.fingerprint} for each in datasets},
            "base": {
                "model": family.source.model,
                "revision": family.source.revision,
                **({"file": family.source.file} if family.source.file else {}),
                "files": ({"single file": memo.digest(family.source.file)} if family.source.file else {})
                | {
                    f"{component.name}/{path.name}": memo.digest(path)
                    for component in family.source.parts(family.spec)
                    for path in component_files(family, component)
                },
            },
        }


def changes_since(path: Path, lock: Mapping[str, Any]) -> list[str]:
    """What differs from the lock at `path`; one that cannot be read is reported and costs the comparison only."""
    try:
        return lock_changes(storage.read_json(path, dict), lock)
    except DataError as error:
        return [f"{error}; what changed since the last start is not known"]
    except (AttributeError, TypeError) as error:
        return [f"{path} is damaged ({error_text(error)}); what changed since the last start is not known"]


def lock_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """One line for each package or file of the base model that is not what it was.

    Options, data and torch have lines of their own where a checkpoint is resumed (`identity.py`).
    """
    lines = []
    for title, before, after in (
        ("package", old.get("packages", {}), new["packages"]),
        ("base model file", old.get("base", {}).get("files", {}), new["base"]["files"]),
    ):
        for name in sorted({*before, *after}):
            if before.get(name) != after.get(name) and name != "torch":
                was, now = before.get(name, "not there"), after.get(name, "not there")
                if title == "base model file":  # digests say nothing to anybody
                    was, now = ("there" if name in side else "not there" for side in (before, after))
                change = f"{was} → {now}" if was != now else "it has other content"
                lines.append(f"{title} {name} changed since the last start: {change}")
    return lines


def installed_versions() -> Iterator[tuple[str, str]]:
    """(package, version) of what decides results and is installed."""
    for name in PACKAGES:
        try:
            yield name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue


def config_files(loaded: LoadedRun) -> list[Path]:
    """The files that the configuration was read from."""
    named = (loaded.config_file, loaded.data_file, loaded.lycoris_file, loaded.config.validation.user_prompt_library)
    return [Path(path) for path in named if path is not None]


def component_files(family: ModelFamily, component: Component) -> list[Path]:
    """Configuration and weights of one part of the model that are on this machine, by name."""
    folder = component_file(family.source, component, component.config_file).parent
    own = family.source.own_place(component)
    if own and own.endswith(SINGLE_FILE):
        return [*sorted(folder.glob("*.json")), Path(own)]
    return sorted(path for path in folder.glob("*.*") if path.suffix in (".json", ".safetensors") and path.is_file())


def train_command(loaded: LoadedRun, program: str = "simpletuner") -> str:
    """The shell command that starts this run again, or goes on with it: its file, and what the command line set.

    Secrets of the command line are left out; they are given again.
    """
    given = [key for key, origin in loaded.origins.items() if origin.kind == "command line"]
    values = loaded.resolved()
    words = [program, "train", *(f"--{key}={_word(values[key])}" for key in given if _is_plain(values.get(key)))]
    command = shlex.join(words)
    return f"CONFIG_PATH={shlex.quote(str(loaded.config_file))} {command}" if loaded.config_file else command


def _is_plain(value: object) -> bool:
    """Whether a value can stand on a command line; secrets, which show as stars, and objects cannot."""
    return isinstance(value, bool | int | float | list) or (isinstance(value, str) and set(value) != {"*"})


def _word(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
