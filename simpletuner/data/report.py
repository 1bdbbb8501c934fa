"""What became of the files of a dataset: how many passed each stage, what was lost, and why.

Names of files are escaped here: they may hold line breaks and terminal codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from simpletuner.data.captions import printable

# Told how far a long phase has come: (what is done, number done, number in all where known).
ProgressReport = Callable[[str, int, int | None], None]

MAX_EXAMPLES = 10


@dataclass
class SetAside:
    """Files that are not used, by reason, with the first paths of each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, path: str) -> None:
        self.add_many(reason, 1, [path])

    def add_many(self, reason: str, count: int, paths: Sequence[str]) -> None:
        """Count `count` files of which some `paths` are given."""
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            examples = self.examples.setdefault(reason, [])
            examples.extend(paths[: MAX_EXAMPLES - len(examples)])

    def summary(self) -> str:
        """Every reason with its count, most frequent first."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return ", ".join(f"{count} x {printable(reason)}" for reason, count in ordered)


@dataclass(frozen=True)
class Funnel:
    """Numbers of pictures of one dataset, from the folder to an epoch.

    Args:
        found: files with a picture's extension.
        readable: decode to the last pixel.
        large_enough: reach `minimum_image_size`.
        captioned: have a caption.
        bucketed: have a training size, and are used.
        per_epoch: samples seen in an epoch, repeats included.
        duplicates: readable pictures whose bytes another one has too; they are kept.
        buckets: (height, width) in pixels -> pictures.
        set_aside: what is not used, and why.
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
    set_aside: SetAside

    def lines(self) -> list[str]:
        """For the terminal: the stages, the buckets, and what was lost."""
        stages = (
            f"{self.found} found, {self.readable} readable, {self.large_enough} large enough, "
            f"{self.captioned} captioned, {self.bucketed} used, {self.per_epoch} per epoch"
        )
        sizes = ", ".join(f"{width}x{height}: {count}" for (height, width), count in sorted(self.buckets.items()))
        lines = [f"{self.dataset_id}: {stages}", f"  sizes (width x height): {sizes}"]
        if self.duplicates:
            lines.append(f"  {self.duplicates} pictures have the same content as another one; all are used")
        for reason, count in sorted(self.set_aside.counts.items(), key=lambda item: -item[1]):
            examples = ", ".join(printable(path) for path in self.set_aside.examples[reason][:3])
            lines.append(f"  {count} not used: {printable(reason)} ({examples}{', ...' if count > 3 else ''})")
        return lines

    def as_json(self) -> dict[str, Any]:
        """One entry of `dataset_report.json`."""
        stages = ("found", "readable", "large_enough", "captioned", "bucketed", "per_epoch", "duplicates")
        reasons = [
            {
                "reason": printable(reason),
                "count": count,
                "examples": [printable(path) for path in self.set_aside.examples[reason]],
            }
            for reason, count in self.set_aside.counts.items()
        ]
        sizes = {f"{width}x{height}": count for (height, width), count in sorted(self.buckets.items())}
        return {
            "id": self.dataset_id,
            **{name: getattr(self, name) for name in stages},
            "sizes": sizes,
            "set_aside": reasons,
        }
