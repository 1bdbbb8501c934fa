"""OmniGen2's data files: a tree of `.yml` mixes, and rows of target, reference images and instruction in `.jsonl`.

The rows become datasets of this program: a folder of links to the targets, one of links for each reference, and a table
with the instructions. Ratios are honored over an epoch, which has as many rows as all files together: smaller files
repeat, of larger ones the rest comes in the next epoch.

Source: VectorSpaceLab/OmniGen2 (Apache-2.0), `omnigen2/dataset/omnigen2_train_dataset.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.commands.omnigen2.keys import Translation, input_pixels
from simpletuner.config.paths import Folders
from simpletuner.config.yaml_reader import read_yaml
from simpletuner.data.tables import TableFault, read_rows
from simpletuner.errors import ConfigError, Problem
from simpletuner.text import NotText, decode, read_file

MIX_SUFFIXES, ROW_SUFFIXES = (".yml", ".yaml"), (".jsonl", ".json")
MAX_JSON_BYTES = 1 << 30
# Of what is wrong with rows: the first ones show what it is.
MAX_PROBLEMS = 20
# An instruction of a text-to-image row that has one of these is trained without it half of the time.
OPENERS = (
    "The image portrays ",
    "The image depicts ",
    "The image captures ",
    "The image highlights ",
    "The image shows ",
    "这张图片展示了",
)
TEXT_TO_IMAGE = ("t2i", "text_to_image")


@dataclass(frozen=True)
class Source:
    """Files of rows that share a ratio.

    Args:
        name: of the file or folder, for ids of datasets.
        files: with rows.
        weight: share of the rows of an epoch, not normalized.
        place: the entry of a mix that names them.
    """

    name: str
    files: tuple[Path, ...]
    weight: float
    place: Problem


@dataclass(frozen=True)
class Row:
    """One sample: absolute paths, and the variants of its instruction."""

    target: Path
    references: tuple[Path, ...]
    captions: tuple[str, ...]


def read_mix(path: Path, working_dir: Path, weight: float = 1.0, seen: tuple[Path, ...] = ()) -> list[Source]:
    """The sources of a mix and of the mixes in it.

    Args:
        weight: of the whole mix.
        seen: mixes that this one is in.

    Raises:
        ConfigError: an entry that cannot be used, a mix that names itself, or ratios that leave nothing.
    """
    document = read_yaml(path)
    entries = document.values.get("data")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(
            document.problem("data", "there is no list of entries", "- path, type and ratio of each file")
        )
    if path.resolve() in seen:
        raise ConfigError(document.problem("data", "this mix is part of itself", fix="remove the entry"))
    ratios, problems = [], []
    for number, entry in enumerate(entries):
        ratio = entry.get("ratio")
        if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not 0 <= ratio < math.inf:
            problems.append(document.problem(f"data[{number}].ratio", f"{ratio} is no ratio", "a number >= 0"))
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
    folders, sources = Folders(working_dir, path.parent), []
    for number, (entry, ratio) in enumerate(zip(entries, ratios, strict=True)):
        place = document.problem(f"data[{number}].path", f'"{entry.get("path")}"')
        share = weight * ratio / sum(ratios)
        if share:
            sources += _sources_of(entry.get("path"), share, place, folders, (*seen, path.resolve()))
    return sources


def _sources_of(name: Any, weight: float, place: Problem, folders: Folders, seen: tuple[Path, ...]) -> list[Source]:
    """What an entry of a mix names."""

    def refused(message: str, allowed: str | None = None) -> ConfigError:
        return ConfigError(Problem(message, place.key, place.file, place.line, allowed, "correct the path"))

    if not isinstance(name, str) or not name:
        raise refused("names no file", "a .yml, .jsonl or .json file, or a folder with some")
    found = folders.find(Path(name))
    if found is None:
        places = " or ".join(str(each) for each in folders.places(Path(name)))
        raise refused(f'"{name}": there is nothing of this name', places)
    if found.is_dir():
        files = sorted(each for suffix in ROW_SUFFIXES for each in found.rglob(f"*{suffix}"))
        if not files:
            raise refused(f'"{name}" holds no .jsonl or .json file')
        return [Source(found.name, tuple(files), weight, place)]
    if found.suffix.lower() in MIX_SUFFIXES:
        return read_mix(found, folders.working_dir, weight, seen)
    if found.suffix.lower() not in ROW_SUFFIXES:
        raise refused(f'"{name}" is of another kind', ".yml, .jsonl or .json")
    name = f"{found.parent.name}-{found.stem}" if found.stem.isdecimal() else found.stem
    return [Source(name, (found,), weight, place)]


def read_source(source: Source, working_dir: Path, skips_bad_rows: bool, notes: list[str]) -> list[Row]:
    """The rows of a source.

    Args:
        skips_bad_rows: leave out rows that cannot be used, and add a line to `notes`, in place of an error.

    Raises:
        ConfigError: rows that cannot be used, each by file and line; or there is none.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for file in source.files:
        folders = Folders(working_dir, file.parent)
        try:
            for line, cells in _cells(file):
                try:
                    rows.append(_row(cells, folders))
                except ValueError as error:
                    problems.append(Problem(str(error), file=str(file), line=line))
        except (OSError, TableFault, NotText) as error:
            raise ConfigError(Problem(f"cannot be read: {error}", file=str(file))) from error
    if problems and not skips_bad_rows:
        more = [] if len(problems) <= MAX_PROBLEMS else [Problem(f"and {len(problems) - MAX_PROBLEMS} more rows")]
        last = Problem("rows cannot be used", fix="correct them, or leave them out with --skip_bad_rows")
        raise ConfigError([*problems[:MAX_PROBLEMS], *more, last])
    if problems:
        notes.append(f"{len(problems)} rows of {source.name} are left out; the first: {problems[0].render()}")
    if not rows:
        message = f"{source.place.message} holds no usable row, and its ratio is above 0"
        raise ConfigError(Problem(message, source.place.key, source.place.file, source.place.line))
    return rows


def _cells(file: Path) -> Iterator[tuple[int | None, Mapping[str, Any]]]:
    """(line, object) of each row; a `.json` file may be one list, whose rows have no lines."""
    if file.suffix.lower() == ".jsonl":
        for row in read_rows(file, ()):
            yield int(row.place.rpartition(" ")[2]), row.cells
        return
    try:
        found = json.loads(decode(read_file(file, MAX_JSON_BYTES)))
    except (ValueError, RecursionError) as error:
        raise TableFault(f"is no JSON: {error}") from None
    for number, cells in enumerate(found if isinstance(found, list) else [found], 1):
        if not isinstance(cells, dict):
            raise TableFault(f"row {number} is not an object")
        yield None, cells


def _row(cells: Mapping[str, Any], folders: Folders) -> Row:
    """A row with its files found.

    Raises:
        ValueError: what is wrong with it.
    """
    task, instruction = (_text(cells, key) for key in ("task_type", "instruction"))
    inputs = cells.get("input_images") or []
    if not isinstance(inputs, list) or not all(isinstance(each, str) and each for each in inputs):
        raise ValueError('"input_images" is no list of paths')
    target, *references = (_found(name, folders) for name in (_text(cells, "output_image"), *inputs))
    return Row(target, tuple(references), caption_variants(instruction, task))


def _text(cells: Mapping[str, Any], key: str) -> str:
    value = cells.get(key)
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" is missing' if value is None else f'"{key}" is no text')
    return value


def _found(name: str, folders: Folders) -> Path:
    path = folders.find(Path(name))
    if path is None or not path.is_file():
        raise ValueError(f'there is no image "{name}"')
    return path


def caption_variants(instruction: str, task: str) -> tuple[str, ...]:
    """The texts that an instruction is trained as, each equally often."""
    if any(word in task for word in TEXT_TO_IMAGE):
        opener = next((each for each in OPENERS if each in instruction), None)
        shorter = instruction.replace(opener, "") if opener else ""
        if shorter.strip():
            return instruction, shorter
    return (instruction,)


def write_datasets(
    translation: Translation, sources: Sequence[Source], rows: Sequence[Sequence[Row]], folder: Path
) -> list[dict[str, Any]]:
    """Write links and tables below `folder`; returns the entries of `multidatabackend.json`.

    Rows with different numbers of references are datasets of their own, since a batch has one number.
    """
    total, weights = sum(map(len, rows)), sum(source.weight for source in sources)
    entries: list[dict[str, Any]] = []
    taken: set[str] = set()
    for source, own in zip(sources, rows, strict=True):
        share = source.weight / weights * total / len(own)
        for count in sorted({len(row.references) for row in own}):
            name = _unused(f"{source.name}-{count}" if count else source.name, taken)
            part = [row for row in own if len(row.references) == count]
            place = _write_links(part, folder / name)
            entries += _entries(translation, name, place, count, share)
    return entries


def _unused(name: str, taken: set[str]) -> str:
    chosen = next(
        each for number in range(len(taken) + 2) if (each := f"{name}.{number}" if number else name) not in taken
    )
    taken.add(chosen)
    return chosen


def _entries(translation: Translation, name: str, place: Path, count: int, share: float) -> list[dict[str, Any]]:
    def entry(dataset_id: str, sub: str, pixels: int) -> dict[str, Any]:
        return {
            "id": dataset_id,
            "type": "local",
            "instance_data_dir": str(place / sub),
            "follow_outside_links": True,
            "resolution": _number(math.sqrt(pixels)),
            "resolution_type": "pixel_area",
            "maximum_side": translation.max_side,
        }

    ids = [f"{name}-image-{number}" for number in range(1, count + 1)]
    target = entry(name, "target", translation.max_output_pixels) | {
        "caption_strategy": "csv",
        "crop": False,
        "enlarge": False,
        "probability": _number(share),
    }
    if count:
        target["conditioning_data"] = ids
    pixels = input_pixels(translation.max_input_pixels, count)
    references = [
        entry(dataset_id, f"image-{number}", pixels)
        | {"dataset_type": "conditioning", "conditioning_type": "reference_loose"}
        for number, dataset_id in enumerate(ids, 1)
    ]
    return [target, *references]


def _number(value: float) -> float:
    return int(value) if value == int(value) else value


def _write_links(rows: Sequence[Row], folder: Path) -> Path:
    """A folder of links that is named by its content; one that is there already is taken as it is."""
    content = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    final = folder / content
    if final.is_dir():
        return final
    staged = folder / f"{content}.{os.getpid()}.partial"
    digits = len(str(len(rows)))
    lines = []
    for number, row in enumerate(rows, 1):
        stem = f"{number:0{digits}}"
        for sub, path in [("target", row.target), *((f"image-{i}", each) for i, each in enumerate(row.references, 1))]:
            link = staged / sub / f"{stem}{path.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
        cells = {"file_name": f"{stem}{row.target.suffix}", "text": list(row.captions)}
        lines.append(json.dumps(cells, ensure_ascii=False))
    storage.write_bytes(staged / "target" / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    if final.is_dir():  # another process of the run was first
        storage.remove_dir(staged)
    else:
        storage.move(staged, final)
    return final
