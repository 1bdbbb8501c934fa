"""Which image of another folder belongs to each image of a dataset: its mask, or a reference.

A partner lies at the same path relative to its folder; only the extension may differ, since photographs are kept as
JPEG and masks must not be.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.index import ImageRow, Index
from simpletuner.text import one_form

# Shapes may differ by a pixel of rounding, or by this share.
_SHAPE_TOLERANCE = 0.02
_QUERY_ROWS = 512


@dataclass(frozen=True)
class Pairs:
    """The partner of each of N images.

    Args:
        ids: (N,) rows of the other folder's index, -1 where there is none that can be used.
        missing: which of the images have no partner.
        misshapen: which have one of another shape (width / height).
    """

    ids: NDArray[np.int64]
    missing: NDArray[np.int64]
    misshapen: NDArray[np.int64]


def pair_images(images: Index, ids: NDArray[np.int64], partners: Index, same_shape: bool) -> Pairs:
    """Find the partner of each image by its path: the same one, or else the only one with another extension.

    Args:
        same_shape: partners of another shape are of no use.
    """
    found = np.full(len(ids), -1, dtype=np.int64)
    missing: list[int] = []
    misshapen: list[int] = []
    for start in range(0, len(ids), _QUERY_ROWS):
        rows = images.images(ids[start : start + _QUERY_ROWS].tolist())
        candidates = partners.images_beside([os.fsencode(row.path) for row in rows])
        for place, (row, near) in enumerate(zip(rows, candidates, strict=True), start):
            same = [each for each in near if _is_path_of(each[1], row)] or near
            if len(same) != 1:
                missing.append(place)
            elif same_shape and not _has_shape_of(same[0][1], row):
                misshapen.append(place)
            else:
                found[place] = same[0][0]
    return Pairs(found, np.array(missing, dtype=np.int64), np.array(misshapen, dtype=np.int64))


def _is_path_of(partner: ImageRow, image: ImageRow) -> bool:
    return one_form(os.fsencode(partner.path)) == one_form(os.fsencode(image.path))


def _has_shape_of(partner: ImageRow, image: ImageRow) -> bool:
    """Whether the partner covers the image, at whatever size it was made."""
    expected = partner.width * image.height / image.width
    return abs(partner.height - expected) <= max(1.0, _SHAPE_TOLERANCE * expected)
