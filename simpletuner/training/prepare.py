"""What comes before the denoiser: the datasets, scanned and checked for being enough to train on, and their caches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import TrainConfig
from simpletuner.data.dataset import Dataset
from simpletuner.data.datasets import UnusableData, build_datasets
from simpletuner.data.holdout import SUFFIX, hold_out
from simpletuner.data.report import FilterReport, ProgressReport, write_report
from simpletuner.errors import ConfigError, DataError, Problem
from simpletuner.models.family import ModelFamily
from simpletuner.training.latents import LatentSources, prepare_latents
from simpletuner.training.process import Process
from simpletuner.training.prompts import prepare_prompts

MAX_LISTED = 10


def prepare_data(
    loaded: LoadedRun, family: ModelFamily, process: Process, datasets: list[Dataset] | None = None
) -> tuple[list[Dataset], LatentSources]:
    """All that happens before the denoiser is loaded: `simpletuner cache build` does this and no more.

    Args:
        datasets: of `prepare_datasets`, where they are read already.

    Raises:
        DataError: as `prepare_datasets` and `prepare_latents`.
        Interrupted: a signal came; what was encoded stays.
    """
    if datasets is None:
        datasets = prepare_datasets(loaded, family, process)
    prepare_prompts(loaded, family, datasets, process)
    share = loaded.config.evaluation.eval_holdout
    hold_out(datasets, share)  # an impossible share is refused before anything is encoded
    kept, sources = prepare_latents(loaded.config, family, datasets, process)
    if process.process_group.is_main and any(new is not old for new, old in zip(kept, datasets, strict=True)):
        reports = [dataset.filter_report for dataset in kept]
        write_report(process.output_dir, reports)  # with what the VAE could not encode
    return with_holdout(kept, sources, share, process)


def with_holdout(
    datasets: list[Dataset], sources: LatentSources, share: float, process: Process
) -> tuple[list[Dataset], LatentSources]:
    """The datasets with `eval_holdout` taken out of training and put into eval datasets, which share the latents."""
    divided = hold_out(datasets, share)
    held = divided[len(datasets) :]
    for dataset in held:
        source = dataset.id.removesuffix(SUFFIX)
        count, whole = dataset.num_images, dataset.num_images + _by_id(divided, source).num_images
        process.inform(f"{source}: {count} of {whole} images are held out for the eval loss")
    return divided, {**sources, **{dataset.id: sources[dataset.id.removesuffix(SUFFIX)] for dataset in held}}


def _by_id(datasets: list[Dataset], dataset_id: str) -> Dataset:
    return next(dataset for dataset in datasets if dataset.id == dataset_id)


def prepare_datasets(loaded: LoadedRun, family: ModelFamily, process: Process) -> list[Dataset]:
    """Scan the folders, tell what is used of them and why the rest is not, and keep that as a file.

    Raises:
        DataError: a dataset without usable images, or no dataset to train on.
    """
    # The others find every index made.
    with process.process_group.main_first(), process.phase("reading the datasets") as progress:

        def show_progress(label: str, done: int, total: int | None) -> None:
            progress.advance(max(done - progress.done, 0))
            process.stop.check()

        try:
            datasets = read_datasets(loaded, family, show_progress)
        except UnusableData as error:
            _report_filters(error.filter_reports, process)
            raise
        progress.summary = f"{sum(dataset.filter_report.bucketed for dataset in datasets)} images"
    _report_filters([dataset.filter_report for dataset in datasets], process)
    require_trainable(loaded, family, datasets, process.process_group.size)
    return datasets


def read_datasets(loaded: LoadedRun, family: ModelFamily, report: ProgressReport | None = None) -> list[Dataset]:
    """The datasets of a run as their folders are now.

    Args:
        report: called with how far each scan has come.

    Raises:
        ConfigError: as `build_datasets`.
        DataError: likewise.
    """
    cache_dir = Path(loaded.config.data.cache_dir)
    return build_datasets(loaded.datasets, loaded.config, family.spec, cache_dir, report, _data_file(loaded))


def require_trainable(loaded: LoadedRun, family: ModelFamily, datasets: list[Dataset], num_processes: int = 1) -> None:
    """Refuse datasets that a run cannot begin on, though each for itself is sound.

    Raises:
        ConfigError: `check_sizes`.
        DataError: `require_training`, `require_full_batches`.
    """
    data_file = _data_file(loaded)
    require_training(datasets, data_file)
    check_sizes(family, datasets, data_file)
    require_full_batches(loaded.config, datasets, data_file, num_processes)


def _data_file(loaded: LoadedRun) -> str | None:
    return str(loaded.data_file) if loaded.data_file else None


def _report_filters(filter_reports: Sequence[FilterReport], process: Process) -> None:
    for filter_report in filter_reports:
        for line in filter_report.lines():
            process.inform(line)
        for line in filter_report.warnings:
            process.warn(line)
    if process.process_group.is_main:
        write_report(process.output_dir, filter_reports)


def require_training(datasets: list[Dataset], data_file: str | None) -> None:
    """Raise where no dataset is trained on.

    Raises:
        DataError: there is none of dataset_type image.
    """
    if not any(dataset.kind == "image" for dataset in datasets):
        raise DataError(
            Problem(
                "there is nothing to train on: no entry has dataset_type image",
                key="dataset_type",
                file=data_file,
                fix="add a dataset of dataset_type image, or enable one",
            )
        )


def require_full_batches(
    config: TrainConfig, datasets: list[Dataset], data_file: str | None, num_processes: int = 1
) -> None:
    """Where `allow_dataset_oversubscription` is false, refuse buckets that cannot fill a single batch.

    Raises:
        DataError: names each dataset with its buckets and the repeats that would do.
    """
    if config.data.allow_dataset_oversubscription is not False:
        return
    problems = []
    for dataset in datasets:
        batch_size = (dataset.batch_size or config.training.train_batch_size) * num_processes
        short = [
            (size, len(members))
            for size, members in sorted(dataset.buckets.items())
            if len(members) * (dataset.repeats + 1) < batch_size
        ]
        if dataset.kind != "image" or not short or dataset.with_replacement:
            continue
        buckets = ", ".join(f"{width}x{height} has {count}" for (height, width), count in short[:MAX_LISTED])
        more = ", ..." if len(short) > MAX_LISTED else ""
        repeats = -(-batch_size // min(count for _, count in short)) - 1
        message = f"buckets with fewer images than a batch of {batch_size} (repeats {dataset.repeats}): {buckets}{more}"
        fix = f"set repeats to {repeats}, lower train_batch_size, or allow_dataset_oversubscription to true"
        problems.append(Problem(message, key=f"{dataset.id}.repeats", file=data_file, fix=fix))
    if problems:
        raise DataError(problems)


def check_sizes(family: ModelFamily, datasets: list[Dataset], data_file: str | None) -> None:
    """Refuse training sizes that the weights cannot take.

    Raises:
        ConfigError: names each dataset or folder of references with such a size.
    """
    limit = family.largest_side()
    sides = {dataset.id: max(map(max, dataset.buckets)) for dataset in datasets}
    sides |= {each.id: each.largest_side() for dataset in datasets for each in dataset.references}
    problems = [
        Problem(
            f"images would have sides of {side} px, too large for {family.source.model}",
            key=f"{name}.resolution",
            file=data_file,
            allowed=f"sides up to {limit} px",
            fix="lower resolution, or choose a squarer crop_aspect",
        )
        for name, side in sides.items()
        if limit is not None and side > limit
    ]
    if problems:
        raise ConfigError(problems)
