"""Rows of edits as `extract-vlm-embeds` reads them, and the texts and images that are encoded for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner.commands.firered.extract_flags import TARGETS, ExtractFlags, Fields
from simpletuner.commands.firered.fetch import is_url
from simpletuner.config.paths import Folders
from simpletuner.data.tables import MAX_CELL, TableFault, read_rows
from simpletuner.errors import ConfigError, Problem
from simpletuner.text import fault_in

# Of what is wrong with rows: the first ones show what it is.
MAX_PROBLEMS = 20
DROPPED = "droptext"
INVERSE = "_inv"
PATH_KEY = "embeddings_tensor_"


@dataclass(frozen=True)
class Line:
    """One line of the table.

    Args:
        number: of the line, from 0; names its files.
        cells: as they are written.
        sources: paths or addresses, in order.
        target: path or address.
        instructions: English and Chinese; empty where there is none.
        inverse_instructions: likewise, for the way back.
    """

    number: int
    cells: Mapping[str, Any]
    sources: tuple[str, ...]
    target: str
    instructions: tuple[str, str]
    inverse_instructions: tuple[str, str]


@dataclass(frozen=True)
class Variant:
    """One file of a row.

    Args:
        name: `en`, `cn`, `droptext`, and these with `_inv`.
        text: what is encoded.
        images: paths or addresses of what it speaks of.
    """

    name: str
    text: str
    images: tuple[str, ...] = field(default=())

    @property
    def request(self) -> tuple[str, tuple[str, ...]]:
        """What decides the embeddings."""
        return self.text, self.images


def variants_of(row: Line, flags: ExtractFlags) -> list[Variant]:
    """What is encoded of a row: as the original does, and the dropped caption for text to image too."""
    sources = () if flags.t2i_mode else row.sources
    texts = (*row.instructions, "")
    variants = [Variant(name, text, sources) for name, text in zip(("en", "cn", DROPPED), texts, strict=True)]
    if not flags.disable_inverse:
        texts = (*row.inverse_instructions, "")
        names = (f"en{INVERSE}", f"cn{INVERSE}", f"{DROPPED}{INVERSE}")
        variants += [Variant(name, text, (row.target,)) for name, text in zip(names, texts, strict=True)]
    return variants


def rows_of(flags: ExtractFlags, working_dir: Path, rank: int, size: int, notes: list[str]) -> list[Line]:
    """The rows of one of `size` processes; every local image of them is there.

    Args:
        notes: gets a line where rows are left out.

    Raises:
        ConfigError: rows that cannot be used, each by file and line; or there is none in the whole table.
    """
    rows: list[Line] = []
    problems: list[Problem] = []
    folders = Folders(working_dir, flags.jsonl_path.absolute().parent)
    num_lines = 0
    try:
        for line, cells in _lines(flags.jsonl_path):
            num_lines += 1
            if line % size != rank:
                continue
            try:
                rows.append(_row(line, cells, flags, folders))
            except ValueError as error:
                problems.append(Problem(str(error), file=str(flags.jsonl_path), line=line + 1))
    except (OSError, TableFault) as error:
        raise ConfigError(Problem(f"cannot be read: {error}", "jsonl_path", str(flags.jsonl_path))) from error
    if problems and not (flags.skip_bad_rows and rows):
        more = [] if len(problems) <= MAX_PROBLEMS else [Problem(f"and {len(problems) - MAX_PROBLEMS} more rows")]
        last = Problem("rows cannot be used", fix="correct them, or leave them out with --skip_bad_rows")
        raise ConfigError([*problems[:MAX_PROBLEMS], *more, last])
    if problems:
        notes.append(f"{len(problems)} rows are left out; the first: {problems[0].render()}")
    if not num_lines:
        raise ConfigError(Problem("holds no row", "jsonl_path", str(flags.jsonl_path)))
    return rows


def _lines(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(number of the line from 0, object)."""
    for row in read_rows(table, ()):
        yield int(row.place.rpartition(" ")[2]) - 1, row.cells


def _row(number: int, cells: Mapping[str, Any], flags: ExtractFlags, folders: Folders) -> Line:
    """A row with its images found.

    Raises:
        ValueError: what is wrong with it.
    """
    fields = flags.fields
    sources = tuple(_image(each, fields.source, flags, folders) for each in _listed(cells.get(fields.source), fields))
    key = fields.target or next((name for name in TARGETS if cells.get(name)), TARGETS[0])
    if not cells.get(key):
        raise ValueError(f'"{key}" is missing')
    return Line(
        number=number,
        cells=cells,
        sources=sources,
        target=_image(cells[key], key, flags, folders),
        instructions=_texts(cells, fields.instructions),
        inverse_instructions=_texts(cells, fields.inverse_instructions),
    )


def _listed(value: Any, fields: Fields) -> Sequence[Any]:
    if value in (None, "", []):
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list):
        raise ValueError(f'"{fields.source}" is neither a path, a list of paths nor null')
    return value


def _image(value: Any, key: str, flags: ExtractFlags, folders: Folders) -> str:
    """The absolute path of an image, or its address."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f'"{key}" contains something that is not a path')
    if is_url(value):
        if not flags.allow_urls:
            raise ValueError(f'"{key}" is a URL, and URLs are read only with --allow_urls: {value}')
        return value
    path = folders.find(Path(value).expanduser())
    if path is None or not path.is_file():
        raise ValueError(f'there is no image "{value}"')
    return str(path)


def _texts(cells: Mapping[str, Any], names: tuple[str, str]) -> tuple[str, str]:
    return _text(cells, names[0]), _text(cells, names[1])


def _text(cells: Mapping[str, Any], key: str) -> str:
    value = cells.get(key)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is not text')
    if len(value) > MAX_CELL:
        raise ValueError(f'"{key}" has more than {MAX_CELL:,} characters')
    if fault := fault_in(value):
        raise ValueError(f'"{key}" {fault}')
    return value


def written_row(
    row: Line,
    images: Mapping[str, Path],
    sizes: Mapping[str, tuple[int, int]],
    files: Mapping[str, Path],
) -> dict[str, Any]:
    """A row as the original writes it, under the names that training reads.

    Args:
        images: address or path -> the local file.
        sizes: address or path -> (height, width).
        files: name of a variant -> its file.
    """

    def shown(name: str) -> dict[str, int]:
        height, width = sizes[name]
        return {"width": width, "height": height}

    target, sources = str(images[row.target]), [str(images[each]) for each in row.sources]
    texts = {
        "instruction": row.instructions[0],
        "instruction_cn": row.instructions[1],
        "inverse_instruction": row.inverse_instructions[0],
        "inverse_instruction_cn": row.inverse_instructions[1],
    }
    return {
        **row.cells,
        "source_image": sources[0] if len(sources) == 1 else sources or None,
        **dict.fromkeys(TARGETS, target),
        **texts,
        "source_image_size": [shown(each) for each in row.sources],
        "edit_image_size": shown(row.target),
        **{f"{PATH_KEY}{name}": path.as_posix() for name, path in files.items()},
    }
