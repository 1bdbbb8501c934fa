"""Looking at a folder of images while somebody answers questions: how many, how large, with which captions.

The index is the one that training uses, in the same place, so what is looked at here need not be looked at again.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from simpletuner.config.datasets import ResolutionType
from simpletuner.data.buckets import BucketRules
from simpletuner.data.captions import caption_variants
from simpletuner.data.index import Catalog, Index
from simpletuner.data.report import SkippedFiles
from simpletuner.families.spec import FamilySpec
from simpletuner.text import printable
from simpletuner.wizard.answers import ImageFacts
from simpletuner.wizard.thumbnails import Thumbnail, make_thumbnails

NAMES_LOOKED_AT = 200
# Beyond this share the names of a folder are called a camera's.
MOSTLY = 0.9


@dataclass(frozen=True)
class FolderReport:
    """What a folder holds.

    Args:
        facts: in numbers.
        smallest, largest: (height, width) in pixels, by area; None where nothing is usable.
        sizes: (height, width, images) of each different size.
        duplicates: images with the content of another one.
        problems: what is not used, one line per reason.
        thumbnails: of a few images; empty where nobody asked for them.
    """

    folder: str
    facts: ImageFacts
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    sizes: Sequence[tuple[int, int, int]]
    duplicates: int
    problems: Sequence[str]
    thumbnails: Sequence[Thumbnail] = ()

    def lines(self) -> list[str]:
        """For people: what there is, then what is wrong."""
        facts = self.facts
        if not facts.usable:
            return [f"no usable images in {self.folder}", *self.problems]
        sizes = f"{_size(self.smallest)} to {_size(self.largest)}" if len(self.sizes) > 1 else _size(self.smallest)
        texts = {0: "no text files", facts.usable: "each has a text file"}
        captions = texts.get(facts.with_text, f"{facts.with_text} have a text file")
        if facts.with_text < facts.usable:
            captions += ", names of a camera" if facts.are_numbered else f", {facts.with_name} a name with words"
        lines = [f"{facts.usable} images, {sizes}; {captions}"]
        if facts.caption:
            lines.append(f"such as: {textwrap.shorten(printable(facts.caption), 100, placeholder=' ...')}")
        if self.duplicates:
            lines.append(f"{self.duplicates} have the same content as another one")
        return [*lines, *self.problems]


def folder_path(folder: str, working_dir: Path) -> Path:
    """Where a folder as typed lies; `~` is the home folder."""
    try:
        return working_dir / Path(folder).expanduser()
    except RuntimeError:  # ~ and a name that no user has
        return working_dir / folder


def look_at_folder(
    folder: str, working_dir: Path, cache_dir: Path, progress: Callable[[int], None], with_thumbnails: bool = False
) -> FolderReport:
    """Scan a folder; what was scanned before is not read again.

    Args:
        folder: as typed, relative to `working_dir`.
        cache_dir: `cache_dir` of the run; the index is kept there.
        progress: told the number of files looked at; what it raises ends the scan.

    Raises:
        DataError: the index cannot be used.
    """
    from simpletuner.data.backends.local import LocalBackend
    from simpletuner.data.datasets import index_path

    root = folder_path(folder, working_dir)
    backend = LocalBackend(root)
    index = Index(index_path(cache_dir, str(root.resolve())), backend)
    try:
        catalog = index.scan(progress, decodes=False)
        report = _report(folder, catalog, index.skipped(with_texts=True))
        report = replace(report, facts=replace(report.facts, caption=_first_caption(index, catalog)))
        return replace(report, thumbnails=make_thumbnails(index, backend, catalog)) if with_thumbnails else report
    finally:
        index.close()


def bucket_lines(
    report: FolderReport, resolution: float, resolution_type: ResolutionType, crop: bool, spec: FamilySpec
) -> list[str]:
    """The sizes that the images are trained at, most frequent first."""
    from simpletuner.data.buckets import bucket_size, choose_aspect

    rules = BucketRules(resolution, resolution_type, crop=crop, alignment=spec.size_multiple)
    buckets: dict[tuple[int, int], int] = {}
    for height, width, count in report.sizes:
        size = bucket_size(choose_aspect(height, width, rules), rules)
        buckets[size] = buckets.get(size, 0) + count
    ordered = sorted(buckets.items(), key=lambda item: -item[1])
    return [f"{_size(size)}: {count}" for size, count in ordered]


def missing_captions(facts: ImageFacts, strategy: str, fallback: str | None = None, has_prompt: bool = False) -> int:
    """Images that a caption strategy and its fallback find nothing for."""
    if fallback:
        return 0 if has_prompt else facts.without_words
    found: Mapping[str, int] = {"textfile": facts.with_text, "filename": facts.with_name}
    return facts.usable - found.get(strategy, facts.usable)


def _report(folder: str, catalog: Catalog, skipped: SkippedFiles) -> FolderReport:
    import numpy as np

    pairs, counts = np.unique(np.stack([catalog.heights, catalog.widths], axis=1), axis=0, return_counts=True)
    sizes = sorted(
        ((int(height), int(width), int(count)) for (height, width), count in zip(pairs, counts, strict=True)),
        key=lambda size: size[0] * size[1],
    )
    areas = catalog.heights.astype(np.float64) * catalog.widths
    has_text = catalog.texts >= 0
    facts = ImageFacts(
        usable=len(catalog),
        with_text=int(has_text.sum()),
        with_name=int(catalog.is_named.sum()),
        without_words=int((~has_text & (~catalog.is_named | catalog.is_camera_name)).sum()),
        are_numbered=bool(len(catalog) and catalog.is_camera_name.mean() > MOSTLY),
        side=int(np.sqrt(np.median(areas))) if len(areas) else 0,
        shapes=frozenset((height, width) for height, width, _ in sizes),
    )
    problems = []
    for reason, count in sorted(skipped.counts.items(), key=lambda item: -item[1]):
        examples = ", ".join(printable(PurePosixPath(path).name) for path in skipped.examples[reason][:2])
        problems.append(f"{count} not used: {printable(reason)} ({examples})")
    smallest, largest = (sizes[0][:2], sizes[-1][:2]) if sizes else (None, None)
    return FolderReport(folder, facts, smallest, largest, sizes, catalog.num_duplicates, problems)


def _first_caption(index: Index, catalog: Catalog) -> str:
    """The first line of the first text file that has one."""
    texts = index.texts([int(key) for key in catalog.texts[:NAMES_LOOKED_AT]])
    return next((lines[0] for text in texts if (lines := caption_variants(text or "", splits_lines=True))), "")


def _size(size: tuple[int, int] | None) -> str:
    return f"{size[1]} x {size[0]}" if size else ""
