"""OmniGen2's mixes: a tree of `.yml` files that say how much of an epoch each file of rows is.

Source: VectorSpaceLab/OmniGen2 (Apache-2.0), `omnigen2/dataset/omnigen2_train_dataset.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner.config.paths import Folders
from simpletuner.config.yaml_reader import YamlDocument, read_yaml
from simpletuner.data.records import TABLE_SUFFIXES
from simpletuner.errors import ConfigError, Problem, plain_value

MIX_SUFFIXES = (".yml", ".yaml")


@dataclass(frozen=True)
class Source:
    """Rows that share a ratio.

    Args:
        name: of the file or folder, for ids of datasets.
        path: a table, or a folder with some.
        weight: share of the rows of an epoch; those of a mix add up to 1.
        place: the entry of a mix that names it, for errors; None where it stands alone.
    """

    name: str
    path: Path
    weight: float = 1.0
    place: Problem | None = None


def read_sources(path: Path, working_dir: Path) -> list[Source]:
    """The sources of a mix and of the mixes in it; of any other file or folder it alone.

    Raises:
        ConfigError: an entry that cannot be used, a mix that names itself, or ratios that leave nothing.
    """
    if path.suffix.lower() in MIX_SUFFIXES and path.is_file():
        return _sources_in(path, working_dir, 1.0, ())
    return [Source(path.stem if path.is_file() else path.name, path)]


def _sources_in(path: Path, working_dir: Path, weight: float, seen: tuple[Path, ...]) -> list[Source]:
    document = read_yaml(path)
    entries = document.values.get("data")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(
            document.problem("data", "there is no list of entries", "- path, type and ratio of each file")
        )
    if path.resolve() in seen:
        raise ConfigError(document.problem("data", "this mix is part of itself", fix="remove the entry"))
    ratios = _ratios(document, entries)
    folders, sources = Folders(working_dir, path.parent), []
    for number, (entry, ratio) in enumerate(zip(entries, ratios, strict=True)):
        place = document.problem(f"data[{number}].path", f'"{entry.get("path")}"')
        share = weight * ratio / sum(ratios)
        if share:
            sources += _sources_of(entry.get("path"), share, place, folders, (*seen, path.resolve()))
    return sources


def _ratios(document: YamlDocument, entries: list[Mapping[str, Any]]) -> list[float]:
    ratios, problems = [], []
    for number, entry in enumerate(entries):
        ratio = entry.get("ratio")
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 <= ratio < math.inf:
            message = f"{plain_value(ratio)} is not a ratio"
            problems.append(document.problem(f"data[{number}].ratio", message, "a number >= 0"))
            ratio = 0.0
        if unknown := entry.keys() - {"path", "type", "ratio"}:
            problems.append(
                document.problem(f"data[{number}].{min(unknown)}", "there is no such key", "path, type, ratio")
            )
        ratios.append(float(ratio))
    if not problems and not sum(ratios):
        problems.append(document.problem("data", "no entry has a ratio above 0"))
    if problems:
        raise ConfigError(problems)
    return ratios


def _sources_of(name: Any, weight: float, place: Problem, folders: Folders, seen: tuple[Path, ...]) -> list[Source]:
    """What an entry of a mix names."""

    def refused(message: str, allowed: str | None = None) -> ConfigError:
        return ConfigError(Problem(message, place.key, place.file, place.line, allowed, "correct the path"))

    if not isinstance(name, str) or not name:
        raise refused("names no file", f"a file .yml, {', '.join(TABLE_SUFFIXES)}, or a folder")
    found = folders.find(Path(name))
    if found is None:
        places = " or ".join(str(each) for each in folders.places(Path(name)))
        raise refused(f'"{name}": there is nothing of this name', places)
    if found.suffix.lower() in MIX_SUFFIXES:
        return _sources_in(found, folders.working_dir, weight, seen)
    if found.is_file() and found.suffix.lower() not in TABLE_SUFFIXES:
        raise refused(f'"{name}" is of another kind', f".yml, {', '.join(TABLE_SUFFIXES)}")
    title = found.name if found.is_dir() else found.stem
    title = f"{found.parent.name}-{title}" if title.isdecimal() else title
    return [Source(title, found, weight, place)]
