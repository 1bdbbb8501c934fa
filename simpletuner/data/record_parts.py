"""From an entry of type `records` to datasets as all others are: one for each source and number of references.

A batch has one number of references, so rows with another number are a part of their own. Each part's `probability`
is such that the parts together show what the entry's own would: the ratios of a mix are met in each epoch, which has
as many rows as all files together; smaller files repeat, of larger ones the rest comes in the next epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from simpletuner.config.datasets import ConditioningDataset, ImageDataset
from simpletuner.config.options.data import DataOptions
from simpletuner.data.backends.records import RecordFiles, RecordsBackend
from simpletuner.data.entry_rules import latents_folder
from simpletuner.data.mixes import Source, read_sources
from simpletuner.data.prompt_files import PromptFiles
from simpletuner.data.records import Record, RecordRules, read_records
from simpletuner.data.report import SkippedFiles
from simpletuner.errors import DataError, Problem
from simpletuner.families.spec import FamilySpec


@dataclass(frozen=True)
class RecordPart:
    """Rows of one source with equally many references.

    Args:
        entry: of the targets; its id is that of the part.
        backend: with the targets and instructions.
        references: the first one of each row, the second one, ...
        records: the rows.
        prompt_files: embeddings of the captions, where the entry names columns of them.
    """

    entry: ImageDataset
    backend: RecordsBackend
    references: tuple[tuple[ConditioningDataset, RecordsBackend], ...]
    records: Sequence[Record]
    prompt_files: PromptFiles | None = None

    def problems(self, skipped: SkippedFiles) -> list[Problem]:
        """The rows whose images were skipped, each by file and line with the last of its reasons."""
        reasons = {PurePosixPath(path).stem: reason for path, reason in skipped.files()}
        found = ((record, reasons.get(record.name)) for record in self.records)
        return [Problem(reason, file=str(each.file), line=each.line) for each, reason in found if reason]


def record_parts(
    entry: ImageDataset, options: DataOptions, spec: FamilySpec, data_file: str | None, notes: list[str]
) -> list[RecordPart]:
    """The parts of an entry whose keys have been checked and whose defaults are filled in.

    Args:
        notes: gets a line where rows are left out.

    Raises:
        ConfigError: a mix that cannot be used.
        DataError: rows that cannot be used, or a row with more references than the family takes.
    """
    assert entry.records_file is not None
    assert entry.instance_data_dir is not None  # filled in where paths are made absolute
    rules = RecordRules(
        entry.instance_data_dir,
        entry.languages or (),
        entry.inverse_instructions,
        entry.tasks or (),
        entry.skip_bad_rows,
        entry.prompt_embeds_column,
        entry.dropped_prompt_embeds_column,
    )
    key = f"{entry.id}.records_file"
    sources = read_sources(entry.records_file, entry.instance_data_dir)
    rows = [_rows_of(source, rules, key, notes) for source in sources]
    _require_fewer_references(rows, options, spec, key, data_file)
    total, weights = sum(map(len, rows)), sum(source.weight for source in sources)
    names = _Names(entry.id)
    parts = []
    for source, own in zip(sources, rows, strict=True):
        parted = _by_count(own)
        counts = sorted(_trained_counts(entry, parted, source, data_file))
        for count in counts:
            part = parted[count]
            share = _share(source.weight / weights, entry, parted, count)
            rounds = share if options.data_backend_sampling == "uniform" else share * total / len(part)
            name = names.unused(source.name if len(sources) > 1 else "", str(count) if len(parted) > 1 else "")
            parts.append(_part(entry, name, part, source, entry.probability * rounds, options, spec))
    return parts


def _by_count(records: Sequence[Record]) -> dict[int, list[Record]]:
    """Number of references -> the rows that have so many."""
    found: dict[int, list[Record]] = {}
    for record in records:
        found.setdefault(len(record.references), []).append(record)
    return found


def _trained_counts(
    entry: ImageDataset, parted: Mapping[int, Sequence[Record]], source: Source, data_file: str | None
) -> list[int]:
    """The numbers of references whose rows are trained.

    Raises:
        DataError: `reference_weights` leaves none.
    """
    weights = entry.reference_weights
    counts = list(parted) if weights is None else [count for count in parted if weights.get(count)]
    if not counts:
        held = ", ".join(map(str, sorted(parted)))
        message = f"the rows of {source.path} have {held} references, which have weight 0"
        raise DataError(Problem(message, f"{entry.id}.reference_weights", data_file))
    return counts


def _share(whole: float, entry: ImageDataset, parted: Mapping[int, Sequence[Record]], count: int) -> float:
    """What the rows with so many references have of the share of their source."""
    if entry.reference_weights is None:
        return whole * len(parted[count]) / sum(map(len, parted.values()))
    present = {each: weight for each, weight in entry.reference_weights.items() if each in parted}
    return whole * present[count] / sum(present.values())


def _rows_of(source: Source, rules: RecordRules, key: str, notes: list[str]) -> list[Record]:
    """The rows of a source; where there is none, the error names the entry of the mix that counts on it."""
    try:
        return read_records(source.path, rules, key, notes)
    except DataError as error:
        place = source.place
        if place is None or len(error.problems) > 1 or "holds no usable row" not in error.problems[0].message:
            raise
        message = f"{place.message} holds no usable row, and its ratio is above 0"
        raise DataError(Problem(message, place.key, place.file, place.line)) from error


def _require_fewer_references(
    rows: Sequence[Sequence[Record]], options: DataOptions, spec: FamilySpec, key: str, data_file: str | None
) -> None:
    most = spec.max_references
    if most and options.conditioning_multidataset_sampling == "random":
        return  # the model sees one of them
    found = next((each for own in rows for each in own if len(each.references) > most), None)
    if found is not None:
        message = f"a row has {len(found.references)} references; {spec.title} takes {most or 'none'}"
        fix = "take the row out, or choose a family that takes so many"
        raise DataError(
            [
                Problem(message, key, data_file, allowed=f"at most {most}", fix=fix),
                Problem("the row", file=str(found.file), line=found.line),
            ]
        )


class _Names:
    """Ids of parts, each once."""

    def __init__(self, entry_id: str):
        self.entry_id = entry_id
        self.taken: set[str] = set()

    def unused(self, *words: str) -> str:
        name = "-".join([self.entry_id, *filter(None, words)])
        chosen = next(each for each in _numbered(name) if each not in self.taken)
        self.taken.add(chosen)
        return chosen


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}.{number}" for number in range(2, 10**9))


def _part(
    entry: ImageDataset,
    name: str,
    records: Sequence[Record],
    source: Source,
    probability: float,
    options: DataOptions,
    spec: FamilySpec,
) -> RecordPart:
    count = len(records[0].references)
    caches = latents_folder(entry, Path(options.cache_dir), spec)
    updates: dict[str, Any] = {
        "id": name,
        "cache_dir_vae": caches / name,
        "probability": probability,
        "crop": False,
        "enlarge": entry.enlarge and "enlarge" in entry.model_fields_set,
        "maximum_side": entry.max_side_length or entry.maximum_side,
        # An opener says what an image shows; an instruction has none.
        "caption_openers": None if count else entry.caption_openers,
    }
    if entry.max_output_pixels is not None:
        updates |= {"resolution": math.sqrt(entry.max_output_pixels), "resolution_type": "pixel_area"}
    identity = f"{source.path.resolve()} {name} {entry.instance_data_dir} {entry.languages} {entry.tasks}"
    identity += f" {entry.inverse_instructions}"
    if entry.prompt_embeds_column:
        identity += f" {entry.prompt_embeds_column}"
    references = tuple(
        (
            _reference(entry, f"{name}-reference-{number + 1}", caches, count),
            RecordsBackend(records, number, source.path, f"{identity} {number}"),
        )
        for number in range(count)
    )
    backend = RecordsBackend(records, None, source.path, identity)
    files = None
    if entry.prompt_embeds_column is not None:
        named, dropped = (RecordFiles(records, source.path, is_dropped) for is_dropped in (False, True))
        files = PromptFiles(named, dropped, spec.prompt_tensors, name)
    return RecordPart(entry.model_copy(update=updates), backend, references, records, files)


def _reference(entry: ImageDataset, name: str, caches: Path, count: int) -> ConditioningDataset:
    assert entry.records_file is not None
    limits = entry.max_input_pixels or ()
    return ConditioningDataset(
        id=name,
        dataset_type="conditioning",
        conditioning_type="reference_loose",
        instance_data_dir=entry.records_file,
        resolution=math.sqrt(limits[min(count, len(limits)) - 1]) if limits else None,
        resolution_type="pixel_area" if limits else None,
        maximum_side=entry.max_side_length,
        cache_dir_vae=caches / name,
    )
