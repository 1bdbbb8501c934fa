"""What the captions of a dataset look like to the model: examples, and how many tokens each one is."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from simpletuner.models.family import ModelFamily

# Enough to find long captions in any set; a tokenizer does so many in seconds.
MAX_COUNTED = 20_000


@dataclass(frozen=True)
class CaptionCheck:
    """The captions of one dataset.

    Args:
        num_captions: all variants of all images.
        num_different: texts that differ.
        num_empty: nothing but blanks, as filters may leave them.
        counted: captions that were tokenized, evenly spread where there are more.
        tokens: (least, median, most) tokens with the model's template; None where the family cannot tell.
        limit: tokens that reach the denoiser.
        num_cut: of the counted ones, those that are longer.
        longest: the caption of most tokens.
    """

    num_captions: int
    num_different: int
    num_empty: int = 0
    counted: int = 0
    tokens: tuple[int, int, int] | None = None
    limit: int = 0
    num_cut: int = 0
    longest: str = ""

    def lines(self) -> list[str]:
        lines = [f"{self.num_captions:,} captions, {self.num_different:,} different"]
        if self.tokens is not None:
            least, median, most = self.tokens
            of_all = "" if self.counted == self.num_captions else f" (of {self.counted:,} that were counted)"
            cut = f"{self.num_cut:,} cut" if self.num_cut else "none cut"
            spread = f"{least} to {most} tokens, half of them up to {median}" if least < most else f"{most} tokens each"
            lines.append(f"{spread}; {self.limit} fit, {cut}{of_all}")
        return lines


def check_captions(captions: Sequence[str], family: ModelFamily) -> CaptionCheck:
    """Count captions, all variants of all images, and their tokens."""
    step = -(-len(captions) // MAX_COUNTED) or 1
    counted = captions[::step]
    lengths = family.count_prompt_tokens(counted)
    different, empty = len(set(captions)), sum(not caption.strip() for caption in captions)
    if not lengths:
        return CaptionCheck(len(captions), different, empty)
    limit = family.max_prompt_tokens
    most = max(range(len(lengths)), key=lengths.__getitem__)
    return CaptionCheck(
        num_captions=len(captions),
        num_different=different,
        num_empty=empty,
        counted=len(counted),
        tokens=(min(lengths), int(statistics.median(lengths)), lengths[most]),
        limit=limit,
        num_cut=sum(length > limit for length in lengths),
        longest=counted[most],
    )
