"""What became of the files of a dataset: how many passed each stage, what was lost, and why.

Names of files are escaped here: they may hold line breaks and terminal codes. Everything that is skipped is listed in
a file of its own, however much it is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.text import printable

# Told how far a long phase has come: (what is done, number done, number in all where known).
ProgressReport = Callable[[str, int, int | None], None]

# Gives (path, reason) of files that are skipped.
Listing = Callable[[], Iterator[tuple[str, str]]]

MAX_EXAMPLES = 10
# Shown on the terminal: damaged files have as many reasons as there are of them.
MAX_REASONS = 20
REPORT_FILE = "dataset_report.json"
SKIPPED_FILE = "dataset_set_aside.jsonl"


@dataclass
class SkippedFiles:
    """Files that are not used: how many for each reason, the first paths of each, and where all can be read again.

    A million files may be skipped, so all paths are never held at once.
    """

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    listings: list[Listing] = field(default_factory=list)

    def add(self, reason: str, path: str) -> None:
        """One file, which is kept."""
        self.add_many(reason, 1, [path], lambda: iter([(path, reason)]))

    def add_many(self, reason: str, count: int, paths: Sequence[str], listing: Listing | None = None) -> None:
        """Count `count` files of which some `paths` are given.

        Args:
            listing: all of them; None where another listing holds them already.
        """
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples.extend(paths[: MAX_EXAMPLES - len(examples)])
            if listing is not None:
                self.listings.append(listing)

    def files(self) -> Iterator[tuple[str, str]]:
        """(path, reason) of every file, read as they are asked for."""
        for listing in self.listings:
            yield from listing()

    def summary(self) -> str:
        """Every reason with its count, most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count} x {printable(reason)}" for reason, count in ordered)


@dataclass(frozen=True)
class Note:
    """What is odd about images that are used all the same: how many, and the first paths."""

    count: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class FilterReport:
    """Numbers of images of one dataset, from the folder to an epoch.

    Args:
        found: files with an image's extension.
        readable: pass the scan: all of them decode, or are PNGs with right checksums that the VAE is still to see.
        large_enough: reach `minimum_image_size`.
        captioned: have a caption.
        bucketed: have a training size, and are used.
        per_epoch: samples seen in an epoch, repeats included.
        duplicates: readable images whose bytes another one has too; they are kept.
        buckets: (height, width) in pixels -> images.
        skipped: what is not used, and why.
        notes: what is odd about readable images.
        warnings: lines on what its owner did not ask for.
        held_out: images that are kept for the eval loss; they are not among those that are used.
    """

    dataset_id: str
    found: int
    readable: int
    large_enough: int
    captioned: int
    bucketed: int
    per_epoch: int
    duplicates: int
    buckets: Mapping[tuple[int, int], int]
    skipped: SkippedFiles
    notes: Mapping[str, Note] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    held_out: int = 0

    def lines(self) -> list[str]:
        """For the terminal: the stages, the buckets, and what was lost."""
        stages = (
            f"{self.found} found, {self.readable} readable, {self.large_enough} large enough, "
            f"{self.captioned} captioned, {self.bucketed} used, {self.per_epoch} per epoch"
        )
        sizes = ", ".join(f"{width}x{height}: {count}" for (height, width), count in sorted(self.buckets.items()))
        lines = [f"{self.dataset_id}: {stages}"]
        if sizes:
            lines.append(f"  sizes (width x height): {sizes}")
        if self.duplicates:
            lines.append(f"  {self.duplicates} of the same content as another image; all are used")
        lines += [f"  {line}" for line in self.note_lines()]
        reasons = sorted(self.skipped.counts.items(), key=lambda item: -item[1])
        for reason, count in reasons[:MAX_REASONS]:
            examples = ", ".join(printable(path) for path in self.skipped.examples[reason][:3])
            lines.append(f"  {count} not used: {printable(reason)} ({examples}{', ...' if count > 3 else ''})")
        if others := sum(count for _, count in reasons[MAX_REASONS:]):
            lines.append(f"  {others} more not used, for other reasons: {SKIPPED_FILE} lists all")
        return lines

    def note_lines(self) -> list[str]:
        """`2 with several frames, of which the first is used (a.gif, b.gif)`"""
        return [
            f"{note.count:,} with {text} ({', '.join(map(printable, note.examples[:3]))}{', ...' * (note.count > 3)})"
            for text, note in self.notes.items()
        ]

    def as_json(self) -> dict[str, Any]:
        """One entry of `dataset_report.json`."""
        stages = ("found", "readable", "large_enough", "captioned", "held_out", "bucketed", "per_epoch", "duplicates")
        reasons = [
            {
                "reason": printable(reason),
                "count": count,
                "examples": [printable(path) for path in self.skipped.examples[reason]],
            }
            for reason, count in self.skipped.counts.items()
        ]
        sizes = {f"{width}x{height}": count for (height, width), count in sorted(self.buckets.items())}
        return {
            "id": self.dataset_id,
            **{name: getattr(self, name) for name in stages},
            "sizes": sizes,
            "notes": [
                {"note": text, "count": note.count, "examples": [printable(path) for path in note.examples]}
                for text, note in self.notes.items()
            ],
            "warnings": list(self.warnings),
            "set_aside": reasons,
        }


def write_report(folder: Path, filter_reports: Iterable[FilterReport]) -> None:
    """Write `dataset_report.json`, and beside it `dataset_set_aside.jsonl` with a line for each file that is not used.

    Raises:
        DataError: the folder cannot be written.
    """
    filter_reports = list(filter_reports)
    write_skipped(folder / SKIPPED_FILE, filter_reports)
    storage.write_json(folder / REPORT_FILE, [filter_report.as_json() for filter_report in filter_reports])


def write_skipped(path: Path, filter_reports: Sequence[FilterReport]) -> None:
    """A line of JSON for each file that is not used.

    Raises:
        DataError: it cannot be written.
    """
    with storage.replacing_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for filter_report in filter_reports:
            for name, reason in filter_report.skipped.files():
                line = {"dataset": filter_report.dataset_id, "path": printable(name), "reason": printable(reason)}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
