"""The datasets of a run: from the entries of the data file and what their folders hold."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simpletuner.config.datasets import (
    ConditioningDataset,
    EvalDataset,
    ImageDataset,
    filters_for,
    masks_for,
    references_for,
    table_path,
)
from simpletuner.data.backends.base import Backend
from simpletuner.data.backends.build import open_backend, source_key
from simpletuner.data.backends.local import LocalBackend
from simpletuner.data.caption_edits import CaptionEdits
from simpletuner.data.caption_findings import with_caption_findings
from simpletuner.data.caption_table import CaptionTable
from simpletuner.data.captioned import caption_warnings, refuse_uncaptioned, without_caption
from simpletuner.data.captions import CaptionRules
from simpletuner.data.conditioning import Partners, ScannedFolder, reference_rules, select_paired, with_masks
from simpletuner.data.dataset import Dataset, RoundSampling, Samples, dataset_fingerprint
from simpletuner.data.empty_masks import report_empty_masks
from simpletuner.data.entry_rules import bucket_rules, caption_rules, check_entry
from simpletuner.data.index import Catalog, Index
from simpletuner.data.prompt_files import PromptFiles
from simpletuner.data.record_parts import record_parts
from simpletuner.data.records import bad_rows
from simpletuner.data.report import FilterReport, ProgressReport, SkippedFiles
from simpletuner.data.selection import (
    group_by_size,
    select_large_enough,
    select_shapes,
    select_sizes,
    select_subset,
)
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.families.spec import FamilySpec

if TYPE_CHECKING:
    from simpletuner.config.options.catalog import TrainConfig

__all__ = ["Dataset", "build_datasets"]

# Words of `skip_file_discovery` for which a folder is not looked at.
TRUSTING = frozenset(("aspect", "metadata"))
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


class UnusableData(DataError):
    """Datasets that cannot be trained on, with what became of their files, so that all can still be listed."""

    def __init__(self, problems: Sequence[Problem], filter_reports: Sequence[FilterReport]):
        super().__init__(problems)
        self.filter_reports = tuple(filter_reports)


def build_datasets(
    entries: Sequence[object],
    config: TrainConfig,
    spec: FamilySpec,
    work_dir: Path,
    report: ProgressReport | None = None,
    data_file: str | None = None,
) -> list[Dataset]:
    """The image and eval datasets of a run, in the order of the data file.

    Args:
        entries: of the data file, with their defaults; disabled ones and those without images are skipped.
        work_dir: the indexes are kept in its folder `index`.
        report: called with the progress of each scan.
        data_file: named in errors.

    Raises:
        ConfigError: a folder that is not there, or settings that give no training size or caption.
        DataError: a dataset without a usable image, or images without captions.
    """
    images = [entry for entry in entries if isinstance(entry, ImageDataset) and not entry.disabled]
    problems = [problem for entry in images for problem in check_entry(entry, config.data, spec, data_file)]
    if problems:
        raise ConfigError(problems)
    scan = _Scans(work_dir, data_file, report)
    datasets: list[Dataset] = []
    filter_reports: list[FilterReport] = []
    for entry in images:
        try:
            if entry.type == "records":
                datasets += datasets_of_records(entry, config, spec, scan, data_file, filters_for(entries))
                continue
            files = EntryFiles(
                table=caption_table(entry, work_dir, data_file),
                references=[(each, scan(each)) for each in references_for(entry, entries)],
                prompt_files=prompt_files(entry, spec, work_dir, data_file),
                folder=scan(entry),
            )
            dataset = build_dataset(entry, files, config, spec, data_file, filters_for(entries))
            filter_reports.append(dataset.filter_report)
            for mask in masks_for(entry, entries):
                dataset = with_masks(dataset, mask, scan(mask), data_file)
                folder = work_dir / "index"
                dataset = report_empty_masks(
                    dataset, config.training.masked_loss_probability, folder, report, data_file
                )
            datasets.append(dataset)
        except DataError as error:
            problems += error.problems
            filter_reports += error.filter_reports if isinstance(error, UnusableData) else ()
    if problems:
        raise UnusableData(problems, filter_reports)
    return with_even_shares(datasets) if config.data.data_backend_sampling == "uniform" else datasets


class _Scans:
    """Scans each tree of files once, however many entries are over it.

    Where one of them trusts the last scan (`skip_file_discovery`) and another does not, the other has its look; so has
    one whose images must be decoded.
    """

    def __init__(self, work_dir: Path, data_file: str | None, report: ProgressReport | None):
        self._work_dir, self._data_file, self._report = work_dir, data_file, report
        self._done: dict[str, ScannedFolder] = {}
        self._trusted: set[str] = set()
        self._decoded: set[str] = set()

    def __call__(self, entry: ImageDataset | ConditioningDataset, backend: Backend | None = None) -> ScannedFolder:
        """The index of an entry's files.

        Args:
            backend: with the files; None opens the one that the entry names.
        """
        is_trusted, decodes = False, True
        if isinstance(entry, ConditioningDataset):
            backend = backend or LocalBackend(entry.instance_data_dir, entry.follow_outside_links)
        else:
            backend = backend or open_backend(entry, self._data_file)
            is_trusted = bool(TRUSTING & {*entry.skip_file_discovery})
            # What is encoded before training is decoded then.
            decodes = bool(entry.vae_cache_ondemand or entry.vae_cache_disable or entry.vae_cache_clear_each_epoch)
        name = backend.identity
        looks_again = (name in self._trusted and not is_trusted) or (decodes and name not in self._decoded)
        if name not in self._done or looks_again:
            index = Index(index_path(self._work_dir, name), backend)
            catalog = index.scan(_scan_progress(entry.id, self._report), is_trusted, decodes)
            self._done[name] = ScannedFolder(index, catalog)
            self._trusted = self._trusted | {name} if is_trusted else self._trusted - {name}
            self._decoded |= {name} if decodes else set()
        return self._done[name]


def datasets_of_records(
    entry: ImageDataset,
    config: TrainConfig,
    spec: FamilySpec,
    scan: _Scans,
    data_file: str | None,
    filters: tuple[str, ...],
) -> list[Dataset]:
    """The parts of an entry of type records.

    Raises:
        ConfigError, DataError: as `record_parts` and `build_dataset`.
    """
    notes: list[str] = []
    problems: list[Problem] = []
    datasets, filter_reports = [], []
    for part in record_parts(entry, config.data, spec, data_file, notes):
        references = [(each, scan(each, backend)) for each, backend in part.references]
        files = EntryFiles(scan(part.entry, part.backend), None, references, part.prompt_files)
        try:
            dataset = build_dataset(part.entry, files, config, spec, data_file, filters)
            filter_reports.append(dataset.filter_report)
            datasets.append(dataset)
        except UnusableData as error:  # no row of this part is left
            filter_reports += error.filter_reports
        problems += part.problems(filter_reports[-1].skipped)
    if problems and not (entry.skip_bad_rows and datasets):
        raise UnusableData(bad_rows(problems, f"{entry.id}.records_file"), filter_reports)
    if notes and datasets:
        first = datasets[0]
        warnings = (*first.filter_report.warnings, *(f"{entry.id}: {note}" for note in notes))
        datasets[0] = dataclasses.replace(
            first, filter_report=dataclasses.replace(first.filter_report, warnings=warnings)
        )
    return datasets


def with_even_shares(datasets: list[Dataset]) -> list[Dataset]:
    """The datasets with what an epoch shows of each where they are mixed evenly (`Sampler`), short batches apart."""
    weights = {each.id: each.entry.probability for each in datasets if each.kind == "image"}
    shown = sum(each.filter_report.per_epoch for each in datasets if each.kind == "image")
    mean = shown / (sum(weights.values()) or 1)
    return [
        dataclasses.replace(
            each, filter_report=dataclasses.replace(each.filter_report, per_epoch=round(weights[each.id] * mean))
        )
        if each.id in weights
        else each
        for each in datasets
    ]


def _scan_progress(dataset_id: str, report: ProgressReport | None) -> Callable[[int], None] | None:
    if report is None:
        return None
    return lambda num_files: report(f"scanning {dataset_id}", num_files, None)


@dataclasses.dataclass(frozen=True)
class EntryFiles:
    """What an entry's images and their captions are made of.

    Args:
        folder: with the images.
        table: where the captions are, for the strategies that have one.
        references: conditioning entries with the reference images.
        prompt_files: embeddings of the captions.
    """

    folder: ScannedFolder
    table: CaptionTable | None = None
    references: Sequence[tuple[ConditioningDataset, ScannedFolder]] = ()
    prompt_files: PromptFiles | None = None


def build_dataset(
    entry: ImageDataset,
    files: EntryFiles,
    config: TrainConfig,
    spec: FamilySpec,
    data_file: str | None,
    filters: tuple[str, ...],
) -> Dataset:
    """One dataset from the images that its folder holds.

    Args:
        filters: edits of captions (`caption_filter_list`).

    Raises:
        DataError: no image is left, or some have no caption.
    """
    seed, folder, table = config.training.seed, files.folder, files.table
    index, catalog = folder.index, folder.catalog
    sizes, captions = bucket_rules(entry, config.data, spec), caption_rules(entry)
    skipped = index.skipped(with_texts=captions.reads_text_files)
    large_enough = select_large_enough(catalog, sizes, index, skipped)
    shaped = select_shapes(catalog, large_enough, sizes, index, skipped)
    if table is not None:
        table.report_unused(catalog, index, skipped)
    missing, lacking = without_caption(shaped, catalog, index, captions, table)
    if len(missing):
        problem = refuse_uncaptioned(entry, missing, lacking, len(shaped), catalog, index, skipped, data_file)
        filter_report = _filter_report(entry, folder, len(large_enough), len(shaped) - len(missing), {}, skipped)
        raise UnusableData([problem], [filter_report])
    partners = [Partners(each, reference_rules(each, entry, sizes, spec), where) for each, where in files.references]
    paired = select_paired(folder, shaped, partners, skipped)
    chosen = select_subset(entry.id, seed, entry.max_num_samples, catalog, paired, index)
    used = select_sizes(entry.id, seed, catalog, chosen, sizes, spec, index, skipped)
    buckets = group_by_size(used.heights, used.widths)
    filter_report = _filter_report(entry, folder, len(large_enough), len(shaped), buckets, skipped)
    if not buckets:
        raise UnusableData([_nothing_left(entry, index, skipped, data_file)], [filter_report])
    filter_report = with_caption_findings(filter_report, entry, captions, table, used.positions, catalog, index)
    content = _content(entry, seed, catalog, captions, table, partners)
    ids, texts = catalog.ids[used.positions], catalog.texts[used.positions]
    seen = tuple(each.of(used.positions) for each in partners)
    # An eval loss compares the same crops each time.
    resamples = bool(entry.vae_cache_clear_each_epoch) and not isinstance(entry, EvalDataset)
    draws = RoundSampling(crops=resamples and sizes.needs_content, flips=entry.random_flip)
    edits = CaptionEdits(filters, entry.caption_shuffle, seed, entry.caption_openers or ())
    samples = Samples(entry.id, seed, index, ids, texts, sizes, captions, draws, edits, table, seen)
    if files.prompt_files is not None:
        content += files.prompt_files.fingerprint
        files.prompt_files.require_files(samples)
    return Dataset(
        entry=entry,
        samples=samples,
        prompt_files=files.prompt_files,
        buckets=buckets,
        fingerprint=dataset_fingerprint(content, sizes, captions, seed, draws, edits),
        filter_report=filter_report,
        backend=index.backend,
    )


def _filter_report(
    entry: ImageDataset,
    folder: ScannedFolder,
    large_enough: int,
    captioned: int,
    buckets: Mapping[tuple[int, int], NDArray[np.int64]],
    skipped: SkippedFiles,
) -> FilterReport:
    counts = {size: len(members) for size, members in buckets.items()}
    used = sum(counts.values())
    return FilterReport(
        dataset_id=entry.id,
        found=folder.index.num_images(),
        readable=len(folder.catalog),
        large_enough=large_enough,
        captioned=captioned,
        bucketed=used,
        per_epoch=round(used * (entry.repeats + 1) * entry.probability),
        duplicates=folder.catalog.num_duplicates,
        buckets=counts,
        skipped=skipped,
        notes=folder.index.notes(),
        warnings=tuple(caption_warnings(entry.id, folder.index)) if caption_rules(entry).reads_text_files else (),
    )


def _content(
    entry: ImageDataset,
    seed: int,
    catalog: Catalog,
    captions: CaptionRules,
    table: CaptionTable | None,
    partners: Sequence[Partners],
) -> list[str]:
    """Digests of the files that a dataset is made of."""
    content = [catalog.images_digest, *([catalog.texts_digest] if captions.reads_text_files else [])]
    content += [table.digest] if table else []
    content += [each.fingerprint for each in partners]
    return content + ([f"{entry.max_num_samples} of {seed}"] if entry.max_num_samples else [])


def caption_table(entry: ImageDataset, work_dir: Path, data_file: str | None) -> CaptionTable | None:
    """The table with the captions of an entry, None for the strategies that have none.

    Raises:
        DataError: it cannot be read.
    """
    path = table_path(entry) if entry.has_caption_table and not entry.only_instance_prompt else None
    if path is None:
        return None
    folder = work_dir / "index"
    return CaptionTable(path, folder, entry.filename_column, entry.caption_column, entry.id, data_file)


def prompt_files(entry: ImageDataset, spec: FamilySpec, work_dir: Path, data_file: str | None) -> PromptFiles | None:
    """The embeddings that stand for the captions of an entry; None where captions are encoded.

    Raises:
        DataError: the table cannot be read, or has no such column.
    """
    path = table_path(entry)
    if entry.prompt_embeds_column is None or path is None:
        return None

    def table(column: str, key: str) -> CaptionTable:
        return CaptionTable(path, work_dir / "index", entry.filename_column, [column], entry.id, data_file, key)

    named = table(entry.prompt_embeds_column, "prompt_embeds_column")
    instead = entry.dropped_prompt_embeds_column
    dropped = table(instead, "dropped_prompt_embeds_column") if instead else None
    return PromptFiles(named, dropped, spec.prompt_tensors, entry.id)


def _nothing_left(entry: ImageDataset, index: Index, skipped: SkippedFiles, data_file: str | None) -> Problem:
    folder = index.backend.location
    if skipped.counts:
        message = f"none of the {index.num_images()} images in {folder} can be used: {skipped.summary()}"
        fix = "replace the files, or change the setting that the reason names"
    else:
        message, fix = f"there are no images in {folder}", "put images there, or correct the path"
    return Problem(
        message,
        key=f"{entry.id}.{source_key(entry)}",
        file=data_file,
        allowed="a place with images (png, jpg, webp, bmp, gif, tiff, avif, heic)",
        fix=fix,
    )


def index_path(work_dir: Path, identity: str) -> Path:
    """The index of a tree of files: a readable file name that differs for each.

    Args:
        identity: of the backend; of a folder its resolved path.
    """
    digest = hashlib.sha256(os.fsencode(identity)).hexdigest()[:16]
    return work_dir / "index" / f"{_UNSAFE.sub('-', Path(identity).name)[:40]}-{digest}.sqlite"
