"""Images without a caption: none may be trained on, so a dataset that has some is refused, and all of them are named.

An empty caption teaches the model what to generate without a prompt. An image that lost its text file would teach it
exactly that, and nobody would see it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.caption_table import CaptionTable
from simpletuner.data.captions import CaptionRules
from simpletuner.data.index import Catalog, Index
from simpletuner.data.report import SkippedFiles
from simpletuner.data.selection import first_paths, skip_positions
from simpletuner.errors import Problem
from simpletuner.text import printable

MAX_LISTED = 10


def without_caption(
    positions: NDArray[np.int64], catalog: Catalog, index: Index, rules: CaptionRules, table: CaptionTable | None
) -> tuple[NDArray[np.int64], str]:
    """Those of the images at `positions` of a catalog that have no caption, and what they lack."""
    missing, lacking = without_own_caption(positions, catalog, index, rules, table)
    if rules.fallback is None or rules.instance_prompts:
        return (missing, lacking) if rules.fallback is None else (missing[:0], lacking)
    is_named = catalog.is_named[missing] & ~catalog.is_camera_name[missing]
    return missing[~is_named], f"{lacking}, and no words in the file name but a camera's"


def without_own_caption(
    positions: NDArray[np.int64], catalog: Catalog, index: Index, rules: CaptionRules, table: CaptionTable | None
) -> tuple[NDArray[np.int64], str]:
    """Those that the strategy finds no caption for, whatever stands in for it, and what they lack."""
    if table is not None:
        return table.without_caption(positions, catalog, index), f"no caption in {table.table}"
    if rules.reads_text_files:
        in_rows = rules.strategy == "table"
        lacking = "no caption in its row" if in_rows else "no text file (same name, .txt or .caption) with text in it"
        return positions[catalog.texts[positions] < 0], lacking
    if rules.reads_file_names:
        is_caption = catalog.is_named[positions]
        if rules.fallback:
            is_caption &= ~catalog.is_camera_name[positions]
        return positions[~is_caption], "no words in the file name"
    return positions[:0], ""


def caption_warnings(dataset_id: str, index: Index) -> Iterator[str]:
    """A line for each kind of caption file whose letters may not be what its owner wrote."""
    for text, note in index.notes(of_texts=True).items():
        names = ", ".join(printable(path) for path in note.examples)
        what = f"{dataset_id}: {note.count:,} with {text} ({names}{', ...' if note.count > len(note.examples) else ''})"
        yield f"{what}: save them as UTF-8 if letters are wrong"


def refuse_uncaptioned(
    entry: ImageDataset,
    missing: NDArray[np.int64],
    lacking: str,
    num_images: int,
    catalog: Catalog,
    index: Index,
    skipped: SkippedFiles,
    data_file: str | None,
) -> Problem:
    """The error for images without a caption; each is skipped too, so that a file lists all of them.

    Args:
        missing: positions of the images, `without_caption`.
        num_images: with and without a caption.
    """
    faulty = {reason: count for reason, count in skipped.counts.items() if reason.startswith("caption file")}
    skip_positions(lacking, missing, catalog, index, skipped)
    names = ", ".join(printable(path) for path in first_paths(missing[:MAX_LISTED], catalog, index))
    more = ", ..." if len(missing) > MAX_LISTED else ""
    notes = f" ({SkippedFiles(faulty).summary()})" if faulty else ""
    return Problem(
        f"{len(missing)} of {num_images} images have {lacking}{notes}: {names}{more}",
        key=f"{entry.id}.caption_strategy",
        file=data_file,
        fix="add the captions, set caption_fallback (instanceprompt gives these images one caption, filename the "
        "name of each), or move these images away",
    )
