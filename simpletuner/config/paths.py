"""Where relative paths lead: the working folder first, then the configuration file's folder.

For a configuration that is shipped with the package it is the other way round: its images and model belong to it,
and a folder `model` that happens to be where somebody starts it does not.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from simpletuner.config.layers import Origin
from simpletuner.config.nearby import exists, nearest_path
from simpletuner.errors import Problem

_WINDOWS_DRIVE = re.compile(r"([A-Za-z]):[\\/]")
_HUB_FILE = re.compile(r"(?P<owner>\w[\w.-]*)/(?P<name>\w[\w.-]*)(/(?P<file>[\w./-]+\.safetensors))?")

PACKAGE = Path(__file__).resolve().parents[1]


# How the name of a model in one file ends.
SINGLE_FILE = ".safetensors"
# In place of the path of a text encoder that a run does without.
WITHOUT = "none"
# Where a model folder may carry a tiny autoencoder of its own, in the form of diffusers' AutoencoderTiny.
PREVIEW_FOLDER = "preview_decoder"


# What PEFT and diffusers call the weights of an adapter in a folder.
ADAPTER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def adapter_file_in(path: Path) -> Path:
    """The adapter file of a folder; any other path as it is."""
    return next((path / name for name in ADAPTER_FILES if (path / name).is_file()), path)


@dataclass(frozen=True)
class Folders:
    """The two folders that relative paths are looked up in, as absolute paths."""

    working_dir: Path
    config_dir: Path | None

    def places(self, path: Path) -> list[Path]:
        """Where `path` may lead, in order."""
        roots = [self.working_dir, self.config_dir] if self.config_dir else [self.working_dir]
        if self.config_dir is not None and self.config_dir.is_relative_to(PACKAGE):
            roots.reverse()
        return list(dict.fromkeys(Path(os.path.normpath(root / path)) for root in roots))

    def find(self, path: Path) -> Path | None:
        """The first place that exists."""
        return next((place for place in self.places(path) if exists(place)), None)

    def output(self, path: Path) -> Path:
        """A path that is made on demand: always in the working folder."""
        return Path(os.path.normpath(self.working_dir / path))

    def shown(self, path: Path) -> str:
        """A file's name in messages: short inside the working folder, else absolute."""
        return str(path.relative_to(self.working_dir)) if path.is_relative_to(self.working_dir) else str(path)

    def missing(self, path: Path, key: str, origin: Origin, what: str) -> Problem:
        """The problem of a path that leads nowhere; lists every place."""
        places = " or ".join(str(place) for place in self.places(path))
        near = self.nearest(path, is_folder=what.endswith("folder"))
        fix = f'did you mean "{near}"?' if near else windows_path_fix(str(path))
        return origin.problem(
            f'"{path}": there is no {what} of this name', key=key, allowed=f"{what} at {places}", fix=fix
        )

    def nearest(self, path: Path, is_folder: bool) -> Path | None:
        """What exists and is spelled almost like `path`, relative as it is."""
        for place in self.places(path):
            found = nearest_path(place)
            if found is not None and found.is_dir() == is_folder:
                return found if path.is_absolute() else Path(os.path.relpath(found, self.working_dir))
        return None


def windows_path_fix(text: str) -> str | None:
    """What to do about a path of Windows on another system; None where it is none."""
    if os.name == "nt":
        return None
    if drive := _WINDOWS_DRIVE.match(text):
        rest = text[drive.end() :].replace("\\", "/").lstrip("/")
        return f"this is a path of Windows; Linux under Windows (WSL) sees it as /mnt/{drive[1].lower()}/{rest}"
    if "\\" in text:
        return f"folders are separated by / here: {text.replace(chr(92), '/')}"
    return None


def adapter_on_hub(text: str) -> tuple[str, str] | None:
    """`owner/name` or `owner/name/file.safetensors` -> repository and file; None for what can only be a path."""
    match = _HUB_FILE.fullmatch(text)
    if match is None or match["name"].endswith(SINGLE_FILE):
        return None
    return f"{match['owner']}/{match['name']}", match["file"] or ADAPTER_FILES[-1]


def looks_like_path(text: str) -> bool:
    """Whether a model's name is a path and not a hub id: those have exactly one slash and no leading dot."""
    is_of_windows = _WINDOWS_DRIVE.match(text) is not None or "\\" in text
    return is_of_windows or text.startswith((".", "/", "~")) or text.count("/") != 1
