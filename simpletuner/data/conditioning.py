"""What conditioning entries add to a dataset: masks, which every picture must have, and references.

A picture without a reference is set aside and the others train: it says nothing about an edit. A picture without a mask
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
from simpletuner.data.index import Catalogue, Index
from simpletuner.data.masks import MaskKind, Masks, require_masks
from simpletuner.data.pairing import pair_pictures
from simpletuner.data.references import ReferenceRules, References
from simpletuner.data.report import SetAside
from simpletuner.data.selection import put_aside
from simpletuner.models.spec import FamilySpec


@dataclasses.dataclass(frozen=True)
class ScannedFolder:
    """A folder's index, and what its scan found."""

    index: Index
    catalogue: Catalogue


class Partners:
    """The references of one folder for the pictures of another one.

    Args:
        entry: the conditioning entry.
        folder: with the references.
    """

    def __init__(self, entry: ConditioningDataset, rules: ReferenceRules, folder: ScannedFolder):
        self.entry = entry
        self.rules = rules
        self.folder = folder
        self._ids = np.zeros(0, dtype=np.int64)

    def pair(self, pictures: ScannedFolder, positions: NDArray[np.int64], set_aside: SetAside) -> NDArray[np.int64]:
        """Those of the pictures at `positions` of a catalogue that have a reference; the others are set aside."""
        index, catalogue = pictures.index, pictures.catalogue
        pairs = pair_pictures(index, catalogue.ids[positions], self.folder.index, same_shape=self.rules.is_strict)
        self._ids = np.full(len(catalogue), -1, dtype=np.int64)
        self._ids[positions] = pairs.ids
        missing = f"no reference picture in {self.entry.id} (the same path, or the only one with another extension)"
        misshapen = f"its reference picture in {self.entry.id} has another shape (reference_loose takes any)"
        put_aside(missing, positions[pairs.missing], catalogue, index, set_aside)
        put_aside(misshapen, positions[pairs.misshapen], catalogue, index, set_aside)
        self._tell_unusable(set_aside)
        return positions[pairs.ids >= 0]

    def of(self, positions: NDArray[np.int64]) -> References:
        """The references of the pictures that are used."""
        return References(self.entry, self.folder.index, self._ids[positions], self.rules)

    @property
    def fingerprint(self) -> str:
        """Changes when a reference, the pairing or the sizes do."""
        parts = [self.entry.id, self.folder.catalogue.pictures_digest, dataclasses.asdict(self.rules)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _tell_unusable(self, set_aside: SetAside) -> None:
        """Count damaged references too: their pictures are only said to have none."""
        label, failed = f"reference picture in {self.entry.id}", self.folder.index.set_aside()
        for reason, count in failed.counts.items():
            set_aside.add_many(f"{label}: {reason}", count, failed.examples[reason])
        set_aside.listings.append(lambda: ((path, f"{label}: {reason}") for path, reason in failed.files()))


def select_paired(
    pictures: ScannedFolder, positions: NDArray[np.int64], partners: Sequence[Partners], set_aside: SetAside
) -> NDArray[np.int64]:
    """The pictures that have a reference in each folder."""
    for each in partners:
        positions = each.pair(pictures, positions, set_aside)
    return positions


def reference_rules(
    entry: ConditioningDataset, pictures: ImageDataset, sizes: BucketRules, spec: FamilySpec
) -> ReferenceRules:
    """The sizes of references; what the entry does not say is as in that of the pictures."""
    return ReferenceRules(
        is_strict=entry.conditioning_type == "reference_strict",
        resolution=entry.resolution or sizes.resolution,
        resolution_type=entry.resolution_type or sizes.resolution_type,
        alignment=sizes.alignment,
        max_side=spec.max_size,
    )


def with_masks(dataset: Dataset, entry: ConditioningDataset, folder: ScannedFolder, data_file: str | None) -> Dataset:
    """The dataset with the masks of a conditioning entry.

    Raises:
        DataError: pictures without a mask.
    """
    kind = cast(MaskKind, entry.conditioning_type)  # the rules of the file have sorted the others out
    index, ids = dataset.samples.picture_index, dataset.samples.ids
    pairs = pair_pictures(index, ids, folder.index, same_shape=True)
    key = f"{dataset.id}.conditioning_data"
    require_masks(pairs, index, ids, key, str(entry.instance_data_dir), data_file)
    digest = folder.catalogue.pictures_digest
    fingerprint = hashlib.sha256(f"{dataset.fingerprint} {kind} {digest}".encode()).hexdigest()
    return dataclasses.replace(dataset, masks=Masks(entry.id, kind, folder.index, pairs.ids), fingerprint=fingerprint)
