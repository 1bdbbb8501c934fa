"""`eval_holdout`: a share of the training images that is never trained on and gives the eval loss.

An image is held out if a number made of its content alone is below the share. So the same images are held out in
every run, in every dataset that has them and at every size; an image that is added changes none of the others, and one
that was held out is never trained on later.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from simpletuner.config.datasets import EvalDataset, ImageDataset
from simpletuner.data.dataset import Dataset
from simpletuner.errors import DataError, Problem
from simpletuner.randomness import keyed_uniform

SUFFIX = ".holdout"


def place_of(digest: str) -> float:
    """A number in [0, 1) that belongs to an image's content."""
    return keyed_uniform("eval holdout", digest)


def hold_out(datasets: Sequence[Dataset], share: float) -> list[Dataset]:
    """The datasets without what is held out, followed by an eval dataset `<id>.holdout` for each that lost something.

    Held-out images are taken out of regularization datasets too, and not evaluated there: their target is the base's.

    Args:
        share: of the images, 0 to 1.

    Raises:
        DataError: no image is held out, or a dataset has no other ones.
    """
    if not share:
        return list(datasets)
    kept, held, lowest = [], [], 1.0
    for dataset in datasets:
        if dataset.kind != "image":
            kept.append(dataset)
            continue
        places = {position: place_of(digest) for position, digest in dataset.used_digests()}
        lowest = min([lowest, *places.values()])
        is_held = np.zeros(len(dataset.samples), dtype=np.bool_)
        is_held[[position for position, place in places.items() if place < share]] = True
        kept.append(_part(dataset, dataset.entry, ~is_held, f"without {share:g}"))
        if is_held.any() and not dataset.is_regularisation:
            held.append(_part(dataset, _eval_entry(dataset.entry), is_held, f"only {share:g}"))
    if not held:
        raise DataError(
            Problem(
                f"{share:g}: none of the images falls into this share, so there would be no eval loss",
                key="eval_holdout",
                allowed=f"more than {lowest:.4f} for these images, at most 0.5",
                fix="hold out a larger share, or give a dataset of dataset_type eval",
            )
        )
    return kept + held


def _part(dataset: Dataset, entry: ImageDataset, chosen: np.ndarray, what: str) -> Dataset:
    """The dataset with some of its images, under another entry; each keeps its index."""
    part = dataset.only(chosen)
    if not part.buckets:
        raise DataError(
            Problem(
                f"all images of dataset {dataset.id} are held out for the eval loss",
                key="eval_holdout",
                fix="hold out a smaller share",
            )
        )
    if part.num_images == dataset.num_images:
        return dataset
    fingerprint = hashlib.sha256(f"{dataset.fingerprint} held out: {what}".encode()).hexdigest()
    counts = {size: len(members) for size, members in part.buckets.items()}
    is_trained = entry is dataset.entry
    shown = dataset.repeats + 1 if is_trained else 0
    filter_report = dataclasses.replace(
        dataset.filter_report,
        dataset_id=entry.id,
        bucketed=part.num_images,
        held_out=dataset.num_images - part.num_images if is_trained else 0,
        per_epoch=round(part.num_images * shown * dataset.entry.probability),
        buckets=counts,
    )
    return dataclasses.replace(part, entry=entry, fingerprint=fingerprint, filter_report=filter_report)


def _eval_entry(entry: ImageDataset) -> EvalDataset:
    values = {name: getattr(entry, name) for name in ImageDataset.model_fields}
    return EvalDataset.model_construct(**{**values, "id": f"{entry.id}{SUFFIX}", "dataset_type": "eval"})
