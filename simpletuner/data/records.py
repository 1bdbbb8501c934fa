"""Rows of edit training: a target, any number of reference images, an instruction, a task.

A row comes from a table (JSON lines, JSON, CSV, Parquet) under this program's names or under those that OmniGen2's and
FireRed's files use, or from a plain folder: `target/a.png` with `reference_1/a.png` and `target/a.txt`, or one folder
for each sample with `target.png`, `reference_1.png` and `instruction.txt`. A row that cannot be used is named with file
and line; nothing is put in its place.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from simpletuner.config.paths import Folders
from simpletuner.data.captions import CAPTION_SUFFIXES
from simpletuner.data.tables import MAX_TEXT_TABLE, TableFault, columns_of, read_rows
from simpletuner.data.transforms import SUFFIXES
from simpletuner.errors import DataError, Problem
from simpletuner.spelling import edit_distance
from simpletuner.text import NotText, decode, fault_in, lines_of, read_file, read_json_text, without_separators

TABLE_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TARGET = ("target", "output_image", "target_image", "edit_image")
REFERENCES = ("references", "input_images", "source_image")
INSTRUCTION, INVERSE = "instruction", "inverse_instruction"
TASK = ("task", "task_type")
# A column that is spelled almost like one of these, and is none, would be left out without anybody seeing it: so many
# letters differ, in names of some length.
_NAMES = (*TARGET, *REFERENCES, *TASK, INSTRUCTION, INVERSE)
_ALMOST, _SHORT = 2, 6
# Language of the column without one in its name.
PLAIN = "en"
SAFETENSORS = ".safetensors"
# How the names of columns with embeddings of inverse instructions end.
INVERSE_FILES = "_inv"
# What a row whose embeddings are in files, and whose texts are empty, is called in reports.
NO_INSTRUCTION = "(no instruction)"
# Of what is wrong with rows: the first ones show what it is.
MAX_PROBLEMS = 20


@dataclass(frozen=True)
class Record:
    """One sample.

    Args:
        name: of the row, unique among those of its file and usable as a file name; without extension.
        target: absolute path.
        references: absolute paths, in the order in which the model sees them.
        captions: the variants of the instruction.
        file: that the row is in.
        line: where in it; None where that is not known.
        prompt_files: embeddings of the captions, where they are read.
        dropped_prompt_file: stands for the dropped caption.
    """

    name: str
    target: Path
    references: tuple[Path, ...]
    captions: tuple[str, ...]
    file: Path
    line: int | None
    prompt_files: tuple[Path, ...] = ()
    dropped_prompt_file: Path | None = None


@dataclass(frozen=True)
class RecordRules:
    """Which rows are taken, and what of them.

    Args:
        root: folder that paths start from; after it they are looked for beside the file.
        languages: of the instructions; all where there are none.
        takes_inverse: a row with an inverse instruction and one reference is a second one, the other way round.
        tasks: rows of other tasks are passed over; all count where there are none.
        skips_bad_rows: rows that cannot be used are left out.
        prompt_column: how the columns of embeddings begin (`NAME_en`, `NAME_cn_inv`); None reads none.
        dropped_column: of the embeddings of a dropped caption.
    """

    root: Path
    languages: tuple[str, ...] = ()
    takes_inverse: bool = False
    tasks: tuple[str, ...] = ()
    skips_bad_rows: bool = False
    prompt_column: str | None = None
    dropped_column: str | None = None


def record_files(path: Path) -> list[Path]:
    """The tables in a folder or the file itself; empty for a plain folder of images."""
    if path.is_file():
        return [path]
    return sorted(each for each in path.rglob("*") if each.suffix.lower() in TABLE_SUFFIXES and each.is_file())


def read_records(path: Path, rules: RecordRules, key: str, notes: list[str]) -> list[Record]:
    """The rows of a table, of a folder of tables, or of a plain folder.

    Args:
        key: of the data file, for errors.
        notes: gets a line where rows are left out.

    Raises:
        DataError: rows that cannot be used, each by file and line; or there is none.
    """
    records: list[Record] = []
    problems: list[Problem] = []
    plain = _plain_samples(path) if path.is_dir() else None
    tables = [] if plain is not None else record_files(path)
    sources = [(path, plain)] if plain is not None else [(file, _table_rows(file, rules)) for file in tables]
    for file, rows in sources:
        try:
            _add_rows(file, rows, rules, records, problems)
        except (OSError, TableFault, NotText) as error:
            raise DataError(Problem(f"cannot be read: {error}", key, str(file))) from error
    if problems and not rules.skips_bad_rows:
        raise DataError(bad_rows(problems, key))
    if problems:
        notes.append(f"{len(problems)} rows of {path} are left out; the first: {problems[0].render()}")
    if not records:
        message = f"{path} holds no usable row" + (f" of the tasks {', '.join(rules.tasks)}" if rules.tasks else "")
        raise DataError(Problem(message, key, allowed="a table with rows, or folders target and reference_1"))
    return records


def bad_rows(problems: Sequence[Problem], key: str) -> list[Problem]:
    """What to say of rows that cannot be used: the first ones, how many more, and what to do."""
    more = [] if len(problems) <= MAX_PROBLEMS else [Problem(f"and {len(problems) - MAX_PROBLEMS} more rows")]
    last = Problem("rows cannot be used", key, fix="correct them, or leave them out with skip_bad_rows")
    return [*problems[:MAX_PROBLEMS], *more, last]


# A row before its files are looked for: its name, its line, its cells.
_Row = tuple[str, int | None, Mapping[str, Any]]


def _add_rows(
    file: Path, rows: Iterator[_Row], rules: RecordRules, records: list[Record], problems: list[Problem]
) -> None:
    folders = Folders(rules.root, file if file.is_dir() else file.parent)
    known: set[str] = set()
    for name, line, cells in rows:
        try:
            _refuse_almost(cells.keys() - known)
            known |= cells.keys()
            records += _records_of(cells, name, folders, rules, file, line)
        except ValueError as error:
            place = file / name if line is None and file.is_dir() else file
            problems.append(Problem(str(error), file=str(place), line=line))


def _records_of(
    cells: Mapping[str, Any], name: str, folders: Folders, rules: RecordRules, file: Path, line: int | None
) -> list[Record]:
    """A row with its files found, and its inverse where that is wanted; empty where its task is not.

    Raises:
        ValueError: what is wrong with it.
    """
    if rules.tasks and _cell(cells, TASK) not in rules.tasks:
        return []
    names = [_text(_cell(cells, TARGET), TARGET[0], cells), *_reference_names(cells)]
    target, *references = (_found(each, folders) for each in names)
    stem = f"{name}-{target.stem}" if line is not None else name
    texts = _captions(cells, INSTRUCTION, folders, rules)
    if not texts.captions:
        of = f" in {', '.join(rules.languages)}" if rules.languages else ""
        raise ValueError(f'"{INSTRUCTION}" is missing{of}')
    found = [Record(stem, target, tuple(references), texts.captions, file, line, texts.files, texts.dropped)]
    if rules.takes_inverse and len(references) == 1:
        texts = _captions(cells, INVERSE, folders, rules)
        if texts.captions:
            back = f"{stem}-inverse"
            found.append(Record(back, references[0], (target,), texts.captions, file, line, texts.files, texts.dropped))
    return found


class _Captions(NamedTuple):
    """Variants of an instruction; where embeddings are read, a file for each and one for the dropped caption."""

    captions: tuple[str, ...]
    files: tuple[Path, ...] = ()
    dropped: Path | None = None


def _captions(cells: Mapping[str, Any], name: str, folders: Folders, rules: RecordRules) -> _Captions:
    """The instructions under `name`; a row whose embeddings are read may have none.

    Raises:
        ValueError: a text that is none, or embeddings that are not there.
    """
    by_language = _by_language(cells, name, rules.languages)
    texts = [(language, text) for language, found in by_language.items() for text in found]
    if rules.prompt_column is None:
        return _Captions(tuple(dict.fromkeys(text for _, text in texts)))
    if several := next((language for language, found in by_language.items() if len(found) > 1), None):
        raise ValueError(f'"{name}" has several texts in {several}, and one file of embeddings')
    suffix = INVERSE_FILES if name == INVERSE else ""
    if not texts and name == INSTRUCTION:
        texts = [(next(iter(by_language), PLAIN), NO_INSTRUCTION)]
    named: dict[str, str] = {}
    for language, text in texts:  # of two languages with one text the first
        named.setdefault(text, f"{rules.prompt_column}_{language}{suffix}")
    files = tuple(_embeddings(cells, column, folders) for column in named.values())
    instead = f"{rules.dropped_column}{suffix}" if rules.dropped_column else None
    dropped = _embeddings(cells, instead, folders) if instead and files and cells.get(instead) else None
    return _Captions(tuple(named), files, dropped)


def _embeddings(cells: Mapping[str, Any], column: str, folders: Folders) -> Path:
    """The safetensors file that a cell names, or the one that was made of it."""
    name = cells.get(column)
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f'"{column}" is missing')
    path = folders.find(Path(name).with_suffix(SAFETENSORS))
    if path is not None:
        return path
    found = folders.find(Path(name))
    if found is not None:
        raise ValueError(
            f'"{name}" is a pickle, which may run a program; turn all of its folder into {SAFETENSORS} files with '
            f"simpletuner convert {found.parent}"
        )
    raise ValueError(f'there is no file "{name}"')


def _cell(cells: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The value under one of several names for the same thing.

    Raises:
        ValueError: two of them say different things.
    """
    given = [(name, cells[name]) for name in names if cells.get(name) not in (None, "", [])]
    for name, value in given[1:]:
        if value != given[0][1]:
            raise ValueError(f'"{given[0][0]}" and "{name}" differ')
    return given[0][1] if given else None


def _reference_names(cells: Mapping[str, Any]) -> list[str]:
    """The references of a row: a list, one path, or columns `reference_1`, `reference_2`, ..."""
    value = _cell(cells, REFERENCES)
    key = next((name for name in REFERENCES if name in cells), REFERENCES[0])
    if isinstance(value, str) and value.lstrip().startswith("["):  # a list in a cell of a CSV file
        try:
            value = read_json_text(value)
        except ValueError:
            raise ValueError(f'"{key}" is not a list of paths') from None
    listed = [value] if isinstance(value, str) else list(value or ()) if isinstance(value, list | None) else None
    if listed is None or not all(isinstance(each, str) and each for each in listed):
        raise ValueError(f'"{key}" is not a list of paths')
    numbered: list[str] = []
    while (each := cells.get(f"reference_{len(numbered) + 1}")) not in (None, ""):
        numbered.append(_text(each, f"reference_{len(numbered) + 1}", cells))
    gap = [name for name in cells if name.startswith("reference_") and name[10:].isdecimal() and cells[name]]
    if len(gap) != len(numbered):
        raise ValueError(f'"reference_{len(numbered) + 1}" is missing, and a later one is given')
    if listed and numbered:
        raise ValueError(f'"{key}" and "reference_1" both name references')
    return listed or numbered


def _by_language(cells: Mapping[str, Any], name: str, languages: Collection[str]) -> dict[str, list[str]]:
    """The instructions under `name` and `name_<language>`: a text, a list of variants, or an object by language."""
    found: dict[str, list[str]] = {}
    for column, value in cells.items():
        if column == name:
            by_language = value if isinstance(value, Mapping) else {PLAIN: value}
        elif column.startswith(f"{name}_"):
            by_language = {column.removeprefix(f"{name}_"): value}
        else:
            continue
        for language, texts in by_language.items():
            if not languages or language in languages:
                own = found.setdefault(language, [])
                for each in texts if isinstance(texts, list | tuple) else [texts]:
                    if each is not None and not isinstance(each, str):
                        raise ValueError(f'"{column}" is not text')
                    if each and each.strip():
                        own.append(_checked(without_separators(each).strip(), column))
    return found


def _text(value: Any, key: str, cells: Mapping[str, Any]) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError(f'"{next((name for name in TARGET if name in cells), key)}" is missing')
    if not isinstance(value, str):
        raise ValueError(f'"{key}" is not text')
    return _checked(value.strip(), key)


def _checked(text: str, key: str) -> str:
    if fault := fault_in(text):
        raise ValueError(f'"{key}" {fault}')
    return text


def _refuse_almost(names: Collection[str]) -> None:
    """Raise where a column's name is almost one that is read."""
    for name in names:
        if _is_read(str(name)):
            continue
        near = [known for known in _NAMES if len(known) >= _SHORT and edit_distance(str(name), known) <= _ALMOST]
        if near:
            raise ValueError(f'there is no column "{name}" in rows; did you mean "{near[0]}"?')


def _found(name: str, folders: Folders) -> Path:
    path = folders.find(Path(name).expanduser())
    if path is None or not path.is_file():
        raise ValueError(f'there is no image "{name}"')
    return path


def _table_rows(file: Path, rules: RecordRules) -> Iterator[_Row]:
    """The rows of a table, named by their line. A `.json` file is one list, whose rows have numbers in place of lines.

    Raises:
        TableFault, OSError, NotText: it cannot be read.
    """
    if file.suffix.lower() != ".json":
        is_parquet = file.suffix.lower() == ".parquet"
        own = tuple(filter(None, (rules.prompt_column, rules.dropped_column)))
        columns = [name for name in columns_of(file) if _is_read(name) or name.startswith(own)] if is_parquet else ()
        for row in read_rows(file, columns):
            line = int(row.place.rpartition(" ")[2])
            yield str(line), line, row.cells
        return
    try:
        found = read_json_text(decode(read_file(file, MAX_TEXT_TABLE)), finite=False)
    except ValueError as error:
        raise TableFault(f"is no JSON: {error}") from None
    for number, cells in enumerate(found if isinstance(found, list) else [found], 1):
        if not isinstance(cells, dict):
            raise TableFault(f"row {number} is not an object")
        yield str(number), number, cells


def _is_read(column: str) -> bool:
    return column in _NAMES or column.startswith((f"{INSTRUCTION}_", f"{INVERSE}_", "reference_"))


def _plain_samples(folder: Path) -> Iterator[_Row] | None:
    """The samples of a plain folder of images; None where it is none."""
    targets = folder / "target"
    if targets.is_dir():
        return _samples_by_name(folder, targets)
    places = sorted({each.parent for each in folder.rglob("target.*") if _is_image(each)})
    return _samples_by_folder(folder, places) if places else None


def _samples_by_name(folder: Path, targets: Path) -> Iterator[_Row]:
    """`target/a.png`, `reference_1/a.jpg`, ..., and `target/a.txt`."""
    numbered = [each for each in folder.glob("reference_*") if each.is_dir() and each.name[10:].isdecimal()]
    by_stem = {
        each.name: {path.stem: path for path in sorted(each.iterdir(), reverse=True) if _is_image(path)}
        for each in numbered
    }
    for target in sorted(each for each in targets.iterdir() if _is_image(each)):
        cells: dict[str, Any] = {"target": str(target), INSTRUCTION: _beside(target)}
        cells |= {name: str(found[target.stem]) for name, found in by_stem.items() if target.stem in found}
        yield target.stem, None, cells


def _samples_by_folder(folder: Path, places: Sequence[Path]) -> Iterator[_Row]:
    """`sample/target.png`, `sample/reference_1.jpg`, ..., and one text file."""
    for place in places:
        cells: dict[str, Any] = {}
        for path in sorted(place.iterdir(), reverse=True):
            if _is_image(path) and (path.stem == "target" or path.stem.startswith("reference_")):
                cells[path.stem] = str(path)
        texts = [each for each in sorted(place.iterdir()) if each.suffix.lower() in CAPTION_SUFFIXES]
        cells[INSTRUCTION] = _lines(texts[0]) if texts else None
        name = str(place.relative_to(folder)).replace("/", "-")
        yield ("sample" if name == "." else name), None, cells


def _beside(target: Path) -> list[str] | None:
    """The lines of the text file of an image, which are variants."""
    names = [target.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
    names += [target.with_name(target.name + suffix) for suffix in CAPTION_SUFFIXES]
    found = next((each for each in names if each.is_file()), None)
    return _lines(found) if found else None


def _lines(path: Path) -> list[str]:
    try:
        return lines_of(decode(read_file(path, MAX_TEXT_TABLE)))
    except (OSError, NotText) as error:
        raise TableFault(f"{path}: {error}") from error


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
