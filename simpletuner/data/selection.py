"""Which images of a folder a dataset uses, and the bucket of each: arithmetic on arrays.

A million images have few different sizes, so each rule is asked once per size. What is left out is counted with its
reason.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from simpletuner.data.buckets import (
    BucketRules,
    BucketSize,
    aspect_choices,
    has_allowed_aspect,
    is_large_enough,
    plan_crop,
    training_size,
)
from simpletuner.data.index import Catalog, Index
from simpletuner.data.report import MAX_EXAMPLES, SkippedFiles
from simpletuner.data.transforms import MAX_PIXELS
from simpletuner.families.spec import FamilySpec
from simpletuner.randomness import keyed_seed


@dataclass(frozen=True)
class Selection:
    """Images that are used: positions in the catalog, and the bucket of each."""

    positions: NDArray[np.int64]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]


def select_large_enough(catalog: Catalog, rules: BucketRules, index: Index, skipped: SkippedFiles) -> NDArray[np.int64]:
    """Positions in the catalog of the images that reach `minimum_image_size`."""
    unique, inverse = _unique_sizes(catalog, np.arange(len(catalog)))
    kept = np.array([is_large_enough(*size, rules) for size in unique], dtype=np.bool_)[inverse]
    unit = {"pixel": "pixels on the shorter side", "area": "megapixels", "pixel_area": "pixels squared"}
    reason = f"smaller than minimum_image_size ({rules.minimum_size:g} {unit[rules.resolution_type]})"
    skip_positions(reason, np.flatnonzero(~kept), catalog, index, skipped)
    return np.flatnonzero(kept)


def select_shapes(
    catalog: Catalog, positions: NDArray[np.int64], rules: BucketRules, index: Index, skipped: SkippedFiles
) -> NDArray[np.int64]:
    """The images whose aspect is allowed and that need not grow too much."""
    limits = f"{rules.minimum_aspect or 0:g} to {rules.maximum_aspect or math.inf:g}"
    growth = f"would grow by more than max_upscale_threshold ({rules.max_upscale or 0:g})"
    for reason, keeps in (
        (f"its width / height is outside of minimum_aspect_ratio, maximum_aspect_ratio ({limits})", has_allowed_aspect),
        (growth, aspect_choices),
    ):
        unique, inverse = _unique_sizes(catalog, positions)
        kept = np.array([bool(keeps(*size, rules)) for size in unique], dtype=np.bool_)[inverse]
        skip_positions(reason, positions[~kept], catalog, index, skipped)
        positions = positions[kept]
    return positions


def select_subset(
    dataset_id: str, seed: int, limit: int | None, catalog: Catalog, positions: NDArray[np.int64], index: Index
) -> NDArray[np.int64]:
    """At most `limit` images, chosen by content: an image more or less in the folder exchanges at most one."""
    if limit is None or len(positions) <= limit:
        return positions
    ranks = np.empty(len(positions), dtype=np.int64)
    for start in range(0, len(positions), 512):
        rows = index.images(catalog.ids[positions[start : start + 512]].tolist())
        ranks[start : start + len(rows)] = [keyed_seed(seed, dataset_id, "subset", row.digest) for row in rows]
    return np.sort(positions[np.argsort(ranks, kind="stable")[:limit]])


def select_sizes(
    dataset_id: str,
    seed: int,
    catalog: Catalog,
    positions: NDArray[np.int64],
    rules: BucketRules,
    spec: FamilySpec,
    index: Index,
    skipped: SkippedFiles,
) -> Selection:
    """The bucket of each image; those whose bucket is too large for the family or for memory are put aside."""
    unique, inverse = _unique_sizes(catalog, positions)
    fits = np.array([_fits(*size, rules, spec) for size in unique], dtype=np.bool_)[inverse]
    skip_positions("its aspect gives a training size that is too large", positions[~fits], catalog, index, skipped)
    positions, inverse = positions[fits], inverse[fits]
    if rules.crop and rules.crop_aspect == "random":
        chosen = _random_sizes(dataset_id, seed, catalog, positions, rules, index)
    else:
        # No key: only random aspects are drawn by content.
        table = np.array([training_size(*size, rules) for size in unique], dtype=np.int64)
        chosen = table.reshape(-1, 2)[inverse]
    return Selection(positions, chosen[:, 0], chosen[:, 1])


def _fits(height: int, width: int, rules: BucketRules, spec: FamilySpec) -> bool:
    # For random aspects any key serves: an image that one draw would spoil is better left out whatever the draw.
    crop = plan_crop(height, width, rules, 0)
    longest = max(crop.height, crop.width)
    resized = crop.intermediate_height * crop.intermediate_width
    return resized <= MAX_PIXELS and (spec.max_size is None or longest <= spec.max_size)


def _random_sizes(
    dataset_id: str, seed: int, catalog: Catalog, positions: NDArray[np.int64], rules: BucketRules, index: Index
) -> NDArray[np.int64]:
    """(N, 2) height and width where the aspect is drawn by content."""
    sizes = np.empty((len(positions), 2), dtype=np.int64)
    for start in range(0, len(positions), 512):
        ids = catalog.ids[positions[start : start + 512]].tolist()
        for offset, row in enumerate(index.images(ids)):
            sizes[start + offset] = training_size(row.height, row.width, rules, seed, dataset_id, row.digest)
    return sizes


def _unique_sizes(catalog: Catalog, positions: NDArray[np.int64]) -> tuple[list[BucketSize], NDArray[np.int64]]:
    """The different (height, width) among images, and which of them each image has: a million images have few."""
    packed = catalog.heights[positions].astype(np.int64) << 32 | catalog.widths[positions]
    unique, inverse = np.unique(packed, return_inverse=True)
    return [(int(value) >> 32, int(value) & 0xFFFFFFFF) for value in unique], inverse


def group_by_size(heights: NDArray[np.int64], widths: NDArray[np.int64]) -> dict[BucketSize, NDArray[np.int64]]:
    """(height, width) -> indices into the used images, ascending."""
    if not len(heights):
        return {}
    packed = heights << 32 | widths
    order = np.argsort(packed, kind="stable")
    starts = np.flatnonzero(np.diff(packed[order], prepend=-1))
    groups = np.split(order, starts[1:])
    return {(int(heights[group[0]]), int(widths[group[0]])): group for group in groups}


def skip_positions(
    reason: str, positions: NDArray[np.int64], catalog: Catalog, index: Index, skipped: SkippedFiles
) -> None:
    """Count images of a catalog as not used."""
    ids = catalog.ids[positions]
    examples = first_paths(positions[:MAX_EXAMPLES], catalog, index)
    skipped.add_many(reason, len(ids), examples, lambda: ((path, reason) for path in index.paths(ids)))


def first_paths(positions: NDArray[np.int64], catalog: Catalog, index: Index) -> list[str]:
    return [row.path for row in index.images(catalog.ids[positions].tolist())]
