"""What conditioning entries add to a dataset: masks, which every image must have, and references.

An image without a reference is skipped and the others train: it says nothing about an edit. An image without a mask
is an error: it would be trained on as a whole, which its owner did not want.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from simpletuner.config.datasets import ConditioningDataset, ImageDataset
from simpletuner.data.buckets import BucketRules
from simpletuner.data.dataset import Dataset
from simpletuner.data.index import Catalog, Index
from simpletuner.data.masks import MaskKind, Masks, require_masks
from simpletuner.data.pairing import pair_images
from simpletuner.data.references import ReferenceRules, References
from simpletuner.data.report import SkippedFiles
from simpletuner.data.selection import skip_positions
from simpletuner.families.spec import FamilySpec


@dataclasses.dataclass(frozen=True)
class ScannedFolder:
    """A folder's index, and what its scan found."""

    index: Index
    catalog: Catalog


class Partners:
    """The references of one folder for the images of another one.

    Args:
        entry: the conditioning entry.
        folder: with the references.
    """

    def __init__(self, entry: ConditioningDataset, rules: ReferenceRules, folder: ScannedFolder):
        self.entry = entry
        self.rules = rules
        self.folder = folder
        self._ids = np.zeros(0, dtype=np.int64)

    def pair(self, images: ScannedFolder, positions: NDArray[np.int64], skipped: SkippedFiles) -> NDArray[np.int64]:
        """Those of the images at `positions` of a catalog that have a reference; the others are skipped."""
        index, catalog = images.index, images.catalog
        pairs = pair_images(index, catalog.ids[positions], self.folder.index, same_shape=self.rules.is_strict)
        self._ids = np.full(len(catalog), -1, dtype=np.int64)
        self._ids[positions] = pairs.ids
        missing = f"no reference image in {self.entry.id} (the same path, or the only one with another extension)"
        misshapen = f"its reference image in {self.entry.id} has another shape (reference_loose takes any)"
        skip_positions(missing, positions[pairs.missing], catalog, index, skipped)
        skip_positions(misshapen, positions[pairs.misshapen], catalog, index, skipped)
        self._report_unusable(skipped)
        return positions[pairs.ids >= 0]

    def of(self, positions: NDArray[np.int64]) -> References:
        """The references of the images that are used."""
        return References(self.entry, self.folder.index, self._ids[positions], self.rules)

    @property
    def fingerprint(self) -> str:
        """Changes when a reference, the pairing or the sizes do."""
        rules = dataclasses.asdict(self.rules)
        if not self.rules.stretches:  # a fingerprint from before stays
            del rules["stretches"]
        parts = [self.entry.id, self.folder.catalog.images_digest, rules]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _report_unusable(self, skipped: SkippedFiles) -> None:
        """Count damaged references too: their images are only said to have none."""
        label, failed = f"reference image in {self.entry.id}", self.folder.index.skipped()
        for reason, count in failed.counts.items():
            skipped.add_many(f"{label}: {reason}", count, failed.examples[reason])
        skipped.listings.append(lambda: ((path, f"{label}: {reason}") for path, reason in failed.files()))


def select_paired(
    images: ScannedFolder, positions: NDArray[np.int64], partners: Sequence[Partners], skipped: SkippedFiles
) -> NDArray[np.int64]:
    """The images that have a reference in each folder."""
    for each in partners:
        positions = each.pair(images, positions, skipped)
    return positions


def reference_rules(
    entry: ConditioningDataset, images: ImageDataset, sizes: BucketRules, spec: FamilySpec
) -> ReferenceRules:
    """The sizes of references; what the entry does not say is as in that of the images."""
    return ReferenceRules(
        is_strict=entry.conditioning_type == "reference_strict",
        resolution=entry.resolution or sizes.resolution,
        resolution_type=entry.resolution_type or sizes.resolution_type,
        alignment=sizes.alignment,
        max_side=min(filter(None, (entry.maximum_side, spec.max_size)), default=None),
        stretches=spec.stretches,
    )


def with_masks(dataset: Dataset, entry: ConditioningDataset, folder: ScannedFolder, data_file: str | None) -> Dataset:
    """The dataset with the masks of a conditioning entry.

    Raises:
        DataError: images without a mask.
    """
    kind = cast(MaskKind, entry.conditioning_type)  # the rules of the file have sorted the others out
    index, ids = dataset.samples.image_index, dataset.samples.ids
    pairs = pair_images(index, ids, folder.index, same_shape=True)
    key = f"{dataset.id}.conditioning_data"
    require_masks(pairs, index, ids, key, str(entry.instance_data_dir), data_file)
    digest = folder.catalog.images_digest
    fingerprint = hashlib.sha256(f"{dataset.fingerprint} {kind} {digest}".encode()).hexdigest()
    return dataclasses.replace(dataset, masks=Masks(entry.id, kind, folder.index, pairs.ids), fingerprint=fingerprint)
