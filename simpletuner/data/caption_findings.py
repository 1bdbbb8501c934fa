"""What a user should know of the captions that images get: texts that are ignored, names of cameras, shared texts."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from simpletuner.config.datasets import ImageDataset
from simpletuner.data.caption_table import CaptionTable
from simpletuner.data.captioned import without_own_caption
from simpletuner.data.captions import CaptionRules, caption_from_name
from simpletuner.data.index import Catalog, Index
from simpletuner.data.report import MAX_EXAMPLES, FilterReport, Note
from simpletuner.data.selection import first_paths
from simpletuner.text import printable

# Types of data whose images have text files beside them; tables show the captions of their rows as such.
WITH_TEXT_FILES = ("local", "aws")


def with_caption_findings(
    filter_report: FilterReport,
    entry: ImageDataset,
    rules: CaptionRules,
    table: CaptionTable | None,
    used: NDArray[np.int64],
    catalog: Catalog,
    index: Index,
) -> FilterReport:
    """The filter report with a warning for each finding, and a note of how many captions `caption_fallback` gives.

    Args:
        used: positions of the images in the catalog.
    """

    def examples(positions: NDArray[np.int64]) -> tuple[str, ...]:
        return tuple(first_paths(positions[:MAX_EXAMPLES], catalog, index))

    def listed(positions: NDArray[np.int64]) -> str:
        return ", ".join(map(printable, examples(positions)[:3])) + ", ..." * (len(positions) > 3)

    warnings, notes = list(filter_report.warnings), dict(filter_report.notes)
    all_have_one = rules.strategy == "instanceprompt" or rules.only_instance_prompt
    with_text = used[catalog.texts[used] >= 0]
    if len(with_text) and not rules.reads_text_files and not rules.only_instance_prompt and _has_text_files(entry):
        fallback = entry.caption_strategy if entry.caption_strategy in ("filename", "instanceprompt") else None
        remedy = "set caption_strategy textfile"
        remedy += f" and caption_fallback {fallback}" if fallback and len(with_text) < len(used) else ""
        warnings.append(
            f"{entry.id}: {len(with_text)} of {len(used)} images have a text file that caption_strategy "
            f"{entry.caption_strategy} does not read ({listed(with_text)}): {remedy}, or remove the files"
        )
    named = used[catalog.is_camera_name[used] & catalog.is_named[used]]
    if len(named) and rules.reads_file_names and not rules.fallback:
        caption = caption_from_name(examples(named)[0])
        warnings.append(
            f"{entry.id}: {len(named)} of {len(used)} captions are names that a camera or a program gave, such as "
            f'"{printable(caption)}" ({listed(named)}): set caption_fallback instanceprompt, or write text files'
        )
    if rules.reads_text_files and table is None and _has_text_files(entry):
        texts, counts = np.unique(catalog.texts[with_text], return_counts=True)
        shared = with_text[np.isin(catalog.texts[with_text], texts[counts > 1])]
        if len(shared):
            warnings.append(
                f"{entry.id}: {len(shared)} images share their text file with another one of the same name "
                f"({listed(shared)}): rename them, unless that is intended"
            )
    if rules.fallback and not all_have_one:
        lacking, _ = without_own_caption(used, catalog, index, rules, table)
        if len(lacking):
            text = f"no caption of their own, which caption_fallback {rules.fallback} gives"
            notes[text] = Note(len(lacking), examples(lacking))
    return dataclasses.replace(filter_report, warnings=tuple(warnings), notes=notes)


def _has_text_files(entry: ImageDataset) -> bool:
    return entry.type in WITH_TEXT_FILES
