"""`simpletuner check`: what a run would see of its data, before anything is trained.

Filter report, sizes, steps, captions and caches as text, and the very crops that the VAE would get as a contact sheet.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.cache.adopting import folders_beside, opened
from simpletuner.cache.latents import LatentCache
from simpletuner.cache.store import TensorStore
from simpletuner.commands.captions import CaptionCheck, check_captions
from simpletuner.commands.contact_sheet import render_sheet, write_sheet
from simpletuner.commands.remedies import remedies_of
from simpletuner.commands.text import Say, columns
from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import TrainConfig
from simpletuner.config.options.data import DataOptions
from simpletuner.config.options.training import TrainingOptions
from simpletuner.data.dataset import Dataset
from simpletuner.data.datasets import UnusableData
from simpletuner.data.entry_rules import latents_folder
from simpletuner.data.holdout import hold_out
from simpletuner.data.kept import KeptSamples
from simpletuner.data.report import SKIPPED_FILE, FilterReport, ProgressReport, write_skipped
from simpletuner.data.sampler import Sampler, build_sampler
from simpletuner.data.tiles import NOTICEABLE, choose_images, enlargement
from simpletuner.errors import bytes_text
from simpletuner.models.build import build_family
from simpletuner.models.family import ModelFamily
from simpletuner.text import count_text, printable
from simpletuner.training.latents import fingerprint_of_vae
from simpletuner.training.planning.encoding import TextCost, text_cost
from simpletuner.training.preflight import check_model_folder
from simpletuner.training.prepare import read_datasets, require_trainable
from simpletuner.training.resuming import total_train_steps

BAR_WIDTH = 30
SCAN_SECONDS = 5.0
KINDS = {"image": "training", "eval": "evaluation"}
SHEET, PAGE, REPORT = "contact_sheet.png", "check.html", "check.json"


@dataclass(frozen=True)
class CacheNeed:
    """The latents of one dataset and of its references: where, how many are there, and what is to come."""

    folders: tuple[Path, ...]
    num_present: int
    num_missing: int
    bytes_missing: int

    def line(self) -> str:
        if not self.num_present + self.num_missing:
            return "none are cached: they are encoded on demand"
        where = " and ".join(str(folder) for folder in self.folders)
        if not self.num_missing:
            return f"all {count_text(self.num_present, 'latent')} in {where}"
        to_come = f"{self.num_missing:,} to encode, {bytes_text(self.bytes_missing)}"
        return f"{self.num_present:,} of {self.num_present + self.num_missing:,} in {where}; {to_come}"


@dataclass(frozen=True)
class DatasetCheck:
    """What is to be reported of one dataset."""

    dataset: Dataset
    captions: CaptionCheck
    cache: CacheNeed
    num_enlarged: int
    largest_factor: float
    remedies: tuple[str, ...]

    @property
    def title(self) -> str:
        kind = "regularisation" if self.dataset.is_regularisation else KINDS[self.dataset.kind]
        held_out = f", {self.dataset.filter_report.held_out:,} held out" if self.dataset.filter_report.held_out else ""
        return f"{self.dataset.id} ({kind}, {count_text(self.dataset.filter_report.bucketed, 'image')}{held_out})"

    @property
    def stages(self) -> list[tuple[str, int]]:
        """The filter report, from the folder to what is used."""
        filter_report = self.dataset.filter_report
        return [
            ("found", filter_report.found),
            ("readable", filter_report.readable),
            ("large enough", filter_report.large_enough),
            ("captioned", filter_report.captioned),
            *([("held out", filter_report.held_out)] if filter_report.held_out else []),
            ("used", filter_report.bucketed),
        ]


@dataclass(frozen=True)
class Steps:
    """How long the run is.

    Args:
        batches_per_epoch: micro-batches over all datasets that are trained on.
        per_epoch: optimizer steps in an epoch.
        total: optimizer steps of the run.
        epochs: that the run amounts to.
    """

    batches_per_epoch: int
    per_epoch: float
    total: int
    epochs: float

    def line(self, batch_size: int, accumulation: int) -> str:
        batches = f"{count_text(self.batches_per_epoch, 'batch', 'batches')} of up to {batch_size} in an epoch"
        accumulated = f", {accumulation} to a step" if accumulation > 1 else ""
        return f"{batches}{accumulated}; {count_text(self.total, 'step')} are {self.epochs:.1f} epochs"


@dataclass(frozen=True)
class Check:
    """Everything that was found out."""

    name: str
    datasets: tuple[DatasetCheck, ...]
    steps: Steps
    steps_line: str
    warnings: tuple[str, ...]
    text: TextCost | None = None


def check(loaded: LoadedRun, say: Say, output: Path | None, images: int) -> Path:
    """Look at configuration and data, tell, and draw the contact sheet.

    Args:
        output: folder of the sheet, the page and the report; by default `check` in the output folder.
        images: of each dataset on the sheet, at most.

    Returns:
        The page.

    Raises:
        SimpleTunerError: what training would raise before it loads the denoiser.
    """
    from simpletuner.commands.check_page import write_page

    folder = output or Path(loaded.config.checkpoint.output_dir) / "check"
    try:
        found = gather(loaded, scan_progress(say))
    except UnusableData as error:
        report_unusable(error.filter_reports, folder, say)
        raise
    for line in report_lines(found):
        say(line)
    folder.mkdir(parents=True, exist_ok=True)
    shown = [(each, choose_images(each.dataset, images)) for each in found.datasets]
    write_sheet(
        folder / SHEET,
        render_sheet(f"{found.name}: the crops that are trained on", [(each.title, tiles) for each, tiles in shown]),
    )
    write_page(folder / PAGE, found, [tiles for _, tiles in shown])
    storage.write_json(folder / REPORT, as_json(found))
    for name in (SHEET, PAGE, REPORT):
        say(f"{name}: {folder / name}")
    report_skipped([each.dataset.filter_report for each in found.datasets], folder, say)
    return folder / PAGE


def scan_progress(say: Say) -> ProgressReport:
    """Says now and then how far a scan has come; of one that is done at once, nothing."""
    last = time.monotonic()

    def report(label: str, done: int, total: int | None) -> None:
        nonlocal last
        if time.monotonic() - last > SCAN_SECONDS:
            last = time.monotonic()
            say(f"{label}: {done:,} files")

    return report


def report_unusable(filter_reports: Sequence[FilterReport], folder: Path, say: Say) -> None:
    """What became of the files, where no run can begin on them: the error that follows says why."""
    for filter_report in filter_reports:
        for line in filter_report.lines():
            say(line)
    report_skipped(filter_reports, folder, say)


def report_skipped(filter_reports: Sequence[FilterReport], folder: Path, say: Say) -> None:
    """Keep the name of each file that is not used, and say where; nothing where all are."""
    if any(filter_report.skipped.counts for filter_report in filter_reports):
        folder.mkdir(parents=True, exist_ok=True)
        write_skipped(folder / SKIPPED_FILE, filter_reports)
        say(f"each file that is not used, and why: {folder / SKIPPED_FILE}")


def gather(loaded: LoadedRun, report: ProgressReport | None = None) -> Check:
    """Scan, and find out; nothing is encoded."""
    check_model_folder(loaded)
    config, family = loaded.config, build_family(loaded.config)
    datasets = read_datasets(loaded, family, report)
    require_trainable(loaded, family, datasets)
    fingerprint = fingerprint_of_vae(family, Path(config.data.cache_dir))
    training = hold_out(datasets, config.evaluation.eval_holdout)
    filter_reports = {dataset.id: dataset.filter_report for dataset in training}
    datasets = [replace(dataset, filter_report=filter_reports[dataset.id]) for dataset in datasets]
    checks = tuple(check_dataset(config, family, dataset, fingerprint) for dataset in datasets)
    steps = count_steps(config.training, build_sampler(config, [each for each in training if each.kind == "image"]))
    line = steps.line(config.training.train_batch_size, config.training.gradient_accumulation_steps)
    name = config.reporting.tracker_run_name or Path(config.checkpoint.output_dir).name
    return Check(name, checks, steps, line, loaded.warnings, text_cost(loaded, family, datasets))


def check_dataset(config: TrainConfig, family: ModelFamily, dataset: Dataset, fingerprint: str) -> DatasetCheck:
    captions_seen: list[str] = []
    factors: list[float] = []
    for sample in dataset.samples:
        captions_seen += sample.captions
        factors.append(enlargement(sample))
    enlarged = [factor for factor in factors if factor > NOTICEABLE]
    captions = check_captions(captions_seen, family)
    return DatasetCheck(
        dataset=dataset,
        captions=captions,
        cache=cache_need(config.data, family, dataset, fingerprint),
        num_enlarged=len(enlarged),
        largest_factor=max(factors, default=1.0),
        remedies=tuple(remedies_of(dataset, config, captions, enlarged)),
    )


def cache_need(options: DataOptions, family: ModelFamily, dataset: Dataset, fingerprint: str) -> CacheNeed:
    """Which latents are there, references included, and how large the others will be, from their shapes."""
    num_all = num_missing = num_bytes = 0
    folders = [latents_folder(part.entry, Path(options.cache_dir), family.spec) for part in dataset.parts]
    for part, folder in zip(dataset.parts, folders, strict=True):
        beside = folders_beside(Path(options.cache_dir) / "vae", folder)
        with TensorStore(folder) as store, opened(beside) as others:
            need = LatentCache(store, family, fingerprint).need(KeptSamples(dataset, part.id), others)
        num_all, num_missing = num_all + need.num_entries, num_missing + need.num_missing
        num_bytes += need.bytes_missing
    return CacheNeed(tuple(dict.fromkeys(folders)), num_all - num_missing, num_missing, num_bytes)


def count_steps(options: TrainingOptions, sampler: Sampler) -> Steps:
    """Of the first epoch; datasets that come or go later change the others."""
    batches, accumulation = sampler.batches_in(0), options.gradient_accumulation_steps
    total = total_train_steps(options, sampler)
    return Steps(batches, batches / accumulation, total, total * accumulation / max(batches, 1))


def report_lines(found: Check) -> list[str]:
    """For the terminal."""
    lines = [f"warning: {line}" for line in found.warnings]
    for each in found.datasets:
        lines += ["", each.title, *filter_lines(each)]
        sizes = [(f"{width}x{height}", f"{count:,}") for (height, width), count in sorted_sizes(each)]
        lines.append(
            f"  sizes: {', '.join(f'{size}: {count}' for size, count in sizes[:8])}{' ...' * (len(sizes) > 8)}"
        )
        lines += [f"  captions: {line}" for line in each.captions.lines()]
        lines += [f"    {printable(caption)[:110]}" for caption in example_captions(each.dataset)]
        lines.append(f"  latents: {each.cache.line()}")
        lines += [f"  warning: {line}" for line in each.dataset.filter_report.warnings]
        lines += [f"  ! {remedy}" for remedy in each.remedies]
    texts = [f"captions: {line}" for line in (found.text.lines() if found.text else ())]
    return [*lines, "", *texts, found.steps_line]


def filter_lines(each: DatasetCheck) -> list[str]:
    most = max(each.dataset.filter_report.found, 1)
    rows = [(f"{count:,}", name, "█" * round(BAR_WIDTH * count / most)) for name, count in each.stages]
    filter_report = each.dataset.filter_report
    per_epoch = f"  {filter_report.per_epoch:,} in each epoch (repeats {each.dataset.repeats})"
    return [*columns(rows), per_epoch, *(f"  {line}" for line in filter_report.note_lines())]


def sorted_sizes(each: DatasetCheck) -> list[tuple[tuple[int, int], int]]:
    """((height, width), images), most images first."""
    return sorted(each.dataset.filter_report.buckets.items(), key=lambda item: (-item[1], item[0]))


def example_captions(dataset: Dataset, count: int = 3) -> list[str]:
    """One caption of some images, spread over the dataset."""
    positions = sorted({index * (len(dataset.samples) - 1) // max(count - 1, 1) for index in range(count)})
    return [dataset.samples[position].captions[0] for position in positions]


def text_json(text: TextCost) -> dict[str, Any]:
    """Bytes are None where they are not known."""
    cost = text.cost
    return {
        "texts": text.num_texts,
        "missing": text.num_missing,
        "bytes_each": cost.caption_bytes if cost else None,
        "bytes_on_disk": text.disk_bytes if cost else None,
        "encoder_bytes": cost.weight_bytes if cost else None,
        "peak_bytes": cost.peak_bytes if cost else None,
    }


def as_json(found: Check) -> dict[str, Any]:
    """`check.json`: the same numbers for programs."""
    return {
        "run": found.name,
        "batches_per_epoch": found.steps.batches_per_epoch,
        "steps": found.steps.total,
        "epochs": found.steps.epochs,
        "warnings": list(found.warnings),
        **({"captions": text_json(found.text)} if found.text else {}),
        "datasets": [
            {
                **each.dataset.filter_report.as_json(),
                "kind": each.dataset.kind,
                "captions": vars(each.captions),
                "latents_present": each.cache.num_present,
                "latents_missing": each.cache.num_missing,
                "bytes_missing": each.cache.bytes_missing,
                "enlarged": each.num_enlarged,
                "largest_factor": each.largest_factor,
                "remedies": list(each.remedies),
            }
            for each in found.datasets
        ],
    }
