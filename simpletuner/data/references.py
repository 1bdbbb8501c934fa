"""Reference images: what the model sees beside the caption, for training edits.

A reference belongs to the image at the same path relative to its folder (`pairing.py`). A strict one is cut exactly
as its image is, so that the two stay aligned pixel by pixel; a loose one keeps its own shape and is only ever
reduced: nothing is learned from pixels that enlarging made up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from simpletuner.batch import Crop, PromptImage, Sample
from simpletuner.config.datasets import ConditioningDataset, ResolutionType
from simpletuner.data.buckets import plan_reduction
from simpletuner.data.index import ImageRow, Index
from simpletuner.data.reading import read_pixels, shown_content, to_image

if TYPE_CHECKING:
    import torch


@dataclasses.dataclass(frozen=True)
class ReferenceRules:
    """How references become training sizes.

    Args:
        is_strict: cut as their images are; otherwise the sizes below count.
        resolution: as in `BucketRules`: larger references are reduced to it.
        alignment: pixels; every side is a multiple of it.
        max_side: pixels; longer references are reduced to it; None where the family has no limit.
        stretches: sides are stretched down to the alignment instead of cut.
    """

    is_strict: bool
    resolution: float
    resolution_type: ResolutionType
    alignment: int
    max_side: int | None = None
    stretches: bool = False


class References:
    """The references of one dataset's images from one folder.

    Args:
        entry: as configured.
        index: of the folder.
        ids: row of the reference of each sample.
    """

    def __init__(self, entry: ConditioningDataset, index: Index, ids: NDArray[np.int64], rules: ReferenceRules):
        self.entry = entry
        self.index = index
        self.rules = rules
        self._ids = ids

    @property
    def id(self) -> str:
        return self.entry.id

    def take(self, positions: NDArray[np.int64], samples: Sequence[Sample]) -> list[Sample]:
        """The references of `samples`, which stand at `positions` of their dataset."""
        rows = self.index.images(self._ids[positions].tolist())
        return [self._reference(row, sample) for row, sample in zip(rows, samples, strict=True)]

    def largest_side(self) -> int:
        """Pixels: the longest side of a loose reference; 0 for strict ones, which are cut as their images are."""
        if self.rules.is_strict:
            return 0
        crops = [plan_reference(*size, self.rules) for size in self.index.sizes(self._ids)]
        return max((max(crop.height, crop.width) for crop in crops), default=0)

    def read_pixels(self, sample: Sample) -> torch.Tensor:
        """The cut-out part of a reference: (3, H, W) float32 in [-1, 1]. Safe to call from several threads.

        Raises:
            DataError: the file is gone or has changed.
        """
        return read_pixels(self.index.backend, sample, f"{self.id}.instance_data_dir")

    def prompt_image(self, sample: Sample) -> PromptImage:
        """A reference as the encoders of its prompt may see it: the cut-out part."""
        crop = sample.crop
        return PromptImage(crop.height, crop.width, shown_content(sample), lambda: to_image(self.read_pixels(sample)))

    def _reference(self, row: ImageRow, sample: Sample) -> Sample:
        return Sample(
            dataset_id=self.id,
            path=row.path,
            digest=row.digest,
            width=row.width,
            height=row.height,
            captions=(),
            crop=sample.crop if self.rules.is_strict else plan_reference(row.height, row.width, self.rules),
            is_flipped=sample.is_flipped,
        )


def plan_reference(height: int, width: int, rules: ReferenceRules) -> Crop:
    """What becomes of a loose reference."""
    limits = (rules.resolution, rules.resolution_type, rules.alignment, rules.max_side)
    return plan_reduction(height, width, *limits, rules.stretches)
