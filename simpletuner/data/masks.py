"""Masks of images: where the loss counts. A mask is cropped exactly like its image, then averaged down to latents.

A mask belongs to the image at the same path relative to its folder (`pairing.py`).
"""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from simpletuner.batch import Crop, Sample
from simpletuner.data.index import ImageRow, Index
from simpletuner.data.pairing import Pairs
from simpletuner.data.transforms import UnusableImage, checked_bytes, load_mask
from simpletuner.errors import DataError, Problem
from simpletuner.text import printable

if TYPE_CHECKING:
    import torch

MaskKind = Literal["mask", "segmentation"]

# Ready masks of small sets stay in memory: they are small, and decoding an image at each step is not.
_MEMO_BYTES = 64 * 2**20
_MAX_LISTED = 10


class Masks:
    """The masks of one dataset's images.

    Args:
        dataset_id: of the conditioning entry.
        kind: `mask` counts by brightness, `segmentation` wherever a pixel is not black.
        index: of the folder with the masks.
        ids: row of the mask of each sample.
    """

    def __init__(self, dataset_id: str, kind: MaskKind, index: Index, ids: NDArray[np.int64]):
        self.dataset_id = dataset_id
        self.kind = kind
        self._index = index
        self._ids = ids
        self._memo: dict[tuple[int, Crop, bool, tuple[int, int]], torch.Tensor] = {}
        self._memo_bytes = 0
        self._lock = threading.Lock()

    def weights(self, position: int, sample: Sample, size: tuple[int, int]) -> torch.Tensor:
        """(1, h, w) float32 in [0, 1]: how much each latent counts, for the crop of `sample`.

        Args:
            position: of the sample in its dataset.
            size: (h, w) of the latents; the crop's sides are multiples of them.

        Raises:
            DataError: the mask is gone, damaged, or no longer the one that was indexed.
        """
        key = (position, sample.crop, sample.is_flipped, size)
        with self._lock:
            known = self._memo.get(key)
        if known is not None:
            return known
        weights = average_down(self.pixels(position, sample), size)
        with self._lock:
            if self._memo_bytes < _MEMO_BYTES:
                self._memo[key] = weights
                self._memo_bytes += weights.numel() * weights.element_size()
        return weights

    def pixels(self, position: int, sample: Sample) -> torch.Tensor:
        """(1, H, W) float32 in [0, 1]: the mask cut as the image of `sample` is.

        Raises:
            DataError: as `weights`.
        """
        (row,) = self._index.images([int(self._ids[position])])
        try:
            data = checked_bytes(self._index.backend.read(os.fsencode(row.path)), row.digest)
        except (OSError, UnusableImage) as error:
            fix = "start the run again: the folder is scanned again, and training continues from the last checkpoint"
            raise self._unreadable(row, error, fix) from error
        try:
            return load_mask(data, sample.crop, sample.is_flipped, binary=self.kind == "segmentation")
        except UnusableImage as error:
            raise self._unreadable(row, error, "replace the mask") from error

    def _unreadable(self, row: ImageRow, error: Exception, fix: str) -> DataError:
        return DataError(
            Problem(
                f"the mask {printable(row.path)} in {self._index.backend.location} cannot be used: {error}",
                key=f"{self.dataset_id}.instance_data_dir",
                fix=fix,
            )
        )


def average_down(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(1, H, W) -> (1, h, w): the mean over the pixels that each latent stands for."""
    height, width = size
    _, pixel_height, pixel_width = pixels.shape
    assert pixel_height % height == 0, f"{pixel_height} is not a multiple of {height}"
    assert pixel_width % width == 0, f"{pixel_width} is not a multiple of {width}"
    blocks = pixels.reshape(1, height, pixel_height // height, width, pixel_width // width)
    return blocks.mean(dim=(2, 4))


def require_masks(
    pairs: Pairs, images: Index, ids: NDArray[np.int64], key: str, folder: str, data_file: str | None
) -> None:
    """Raise where an image has no mask, or one of another shape.

    Args:
        ids: of the images that were paired.

    Raises:
        DataError: lists the first ten images.
    """
    problems = []
    for places, what, fix in (
        (pairs.missing, "have no mask (the same path, or the only one with another extension)", "add masks"),
        (pairs.misshapen, "have a mask of another shape (width / height)", "make masks of the whole image"),
    ):
        if len(places):
            listed = images.images(ids[places[:_MAX_LISTED]].tolist())
            names = ", ".join(printable(row.path) for row in listed)
            more = ", ..." if len(places) > _MAX_LISTED else ""
            message = f"{len(places)} of {len(ids)} images {what} in {folder}: {names}{more}"
            remedy = f"{fix}, or move these images to an entry without conditioning_data"
            problems.append(Problem(message, key=key, file=data_file, fix=remedy))
    if problems:
        raise DataError(problems)
