"""Masks that leave nothing of their image inside its crop: such an image never counts, so it is named before the start.

The masks are read once for each content of the two folders and each way of cutting; the result is kept by the index.
"""

from __future__ import annotations

import contextlib
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from simpletuner import storage
from simpletuner.batch import Crop, Sample
from simpletuner.data.dataset import Dataset
from simpletuner.data.report import ProgressReport
from simpletuner.disk import DiskError
from simpletuner.errors import DataError, Problem
from simpletuner.text import printable

# Raise it when the same masks would give another result.
_VERSION = 1
_CHUNK = 256
_MAX_LISTED = 10
_THREADS = 4


def report_empty_masks(
    dataset: Dataset, masking: float, folder: Path, report: ProgressReport | None, data_file: str | None
) -> Dataset:
    """The dataset with a warning for images whose mask leaves nothing.

    Args:
        masking: how often masks count (`masked_loss_probability`).
        folder: where the result is kept.

    Raises:
        DataError: no image is left that could be trained on, or masks cannot be read.
    """
    if dataset.masks is None or not masking:
        return dataset
    empty = _empty_masks(dataset, folder, report)
    if not empty:
        return dataset
    names = [printable(sample.path) for sample in dataset.samples.take(empty[:_MAX_LISTED])]
    listed = ", ".join(names) + ", ..." * (len(empty) > _MAX_LISTED)
    count, where = len(dataset.samples), "" if dataset.samples.draws.crops else " inside the crop"
    message = f"{len(empty)} of {count} images have a mask that leaves nothing{where}"
    if len(empty) == count and masking == 1:
        raise DataError(
            Problem(
                f"{message}, so the loss would be 0: {listed}",
                key=f"{dataset.id}.conditioning_data",
                file=data_file,
                allowed="masks that are not black where the loss counts",
                fix="check the masks, or that the crop keeps what they mark",
            )
        )
    chance = "" if masking == 1 else " whenever the mask counts"
    warning = f"{dataset.id}: {message} and are not trained on{chance}: {listed}"
    filter_report = dataclasses.replace(dataset.filter_report, warnings=(*dataset.filter_report.warnings, warning))
    return dataclasses.replace(dataset, filter_report=filter_report)


def _empty_masks(dataset: Dataset, folder: Path, report: ProgressReport | None) -> list[int]:
    """Positions of the images whose mask leaves nothing, ascending."""
    path = folder / f"masks-{dataset.fingerprint[:32]}-{_VERSION}.json"
    if path.is_file():
        try:
            noted = [range(len(dataset.samples))[position] for position in storage.read_json(path)["empty"]]
        except (DataError, KeyError, TypeError, IndexError):
            pass  # made again
        else:
            return noted
    empty: list[int] = []
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="masks") as pool:
        for start in range(0, len(dataset.samples), _CHUNK):
            positions = range(start, min(start + _CHUNK, len(dataset.samples)))
            samples = dataset.samples.take(positions)
            is_empty = pool.map(_leaves_nothing, [dataset] * len(positions), positions, samples)
            empty += [position for position, is_one in zip(positions, is_empty, strict=True) if is_one]
            if report is not None:
                report(f"reading masks of {dataset.id}", positions.stop, len(dataset.samples))
    with contextlib.suppress(DiskError):  # of a folder that is only read: looked for again at each start
        storage.write_json(path, {"empty": empty})
    return empty


def _leaves_nothing(dataset: Dataset, position: int, sample: Sample) -> bool:
    assert dataset.masks is not None
    if dataset.samples.draws.crops:  # cut elsewhere in each round: all of the mask
        whole = Crop(sample.height, sample.width, 0, 0, sample.height, sample.width)
        sample = dataclasses.replace(sample, crop=whole)
    return not bool((dataset.masks.pixels(position, sample) > 0).any())
