"""What is done to captions after they are found: filters of the user, and variants with shuffled tags.

Both give the same texts for the same caption, so whoever encodes captions ahead of time meets every text that training
will ask for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from simpletuner.config.caption_filters import parse_filter
from simpletuner.config.dataset_values import SEPARATORS, TagShuffle
from simpletuner.data.interleave import generator, permutation


@dataclass(frozen=True)
class CaptionEdits:
    """The edits of one dataset's captions.

    Args:
        filters: texts that `parse_filter` takes, applied in order.
        openers: a caption that has one of them is trained without it half of the time.
        shuffle: None leaves tags in their order.
        seed: of the run, for a shuffle that has none of its own.
    """

    filters: tuple[str, ...] = ()
    shuffle: TagShuffle | None = None
    seed: int = 0
    openers: tuple[str, ...] = ()

    @cached_property
    def _parsed(self) -> list[tuple[re.Pattern[str], str]]:
        return [parse_filter(text) for text in self.filters]

    def apply(self, captions: Sequence[str]) -> tuple[str, ...]:
        """Every variant after the edits. A caption that the filters empty stays, as the empty caption."""
        if self.filters:
            captions = [self._filtered(caption) for caption in captions]
        if self.openers:
            shorter = [self._without_opener(caption) for caption in captions]
            # Each with its other form, or twice, so that all of several variants stay equally likely.
            if shorter != list(captions):
                captions = [each for pair in zip(captions, shorter, strict=True) for each in pair]
        if self.shuffle:
            variants = [variant for caption in captions for variant in self._shuffled(caption, self.shuffle)]
            captions = list(dict.fromkeys(variants))
        return tuple(captions)

    def _filtered(self, caption: str) -> str:
        for pattern, replacement in self._parsed:
            caption = pattern.sub(replacement, caption)
        return caption.strip()

    def _without_opener(self, caption: str) -> str:
        """The caption without the first of the openers that it has, wherever that stands; never empty."""
        opener = next((each for each in self.openers if each in caption), None)
        shorter = caption.replace(opener, "").strip() if opener else ""
        return shorter or caption

    def _shuffled(self, caption: str, shuffle: TagShuffle) -> list[str]:
        """The caption and its variants; the caption alone where there is nothing to shuffle or drop."""
        first, loose, last = split_tags(caption, shuffle)
        separator = SEPARATORS[shuffle.split_on]
        joint = separator if separator == " " else f"{separator} "
        has_marks = shuffle.keep_separator is not None and shuffle.keep_separator in caption
        original = joint.join([*first, *loose, *last]) if has_marks else caption
        if not loose or (len(loose) < 2 and not shuffle.dropout):
            return [original]
        seed = self.seed if shuffle.seed is None else shuffle.seed
        variants = [original] if shuffle.include_original else []
        for number in range(shuffle.count):
            order = permutation(len(loose), seed, "tags", caption, number)
            if shuffle.dropout:
                is_kept = generator(seed, "dropped tags", caption, number).random(len(loose)) >= shuffle.dropout
                order = order[is_kept[order]]
            variants.append(joint.join([*first, *(loose[index] for index in order), *last]))
        return variants


def split_tags(caption: str, shuffle: TagShuffle) -> tuple[list[str], list[str], list[str]]:
    """Tags that stay in front, those that are shuffled and dropped, and those that stay at the end.

    Marks in the caption say where each part ends; a caption without one has `position_start` first tags that stay.
    """
    separator = SEPARATORS[shuffle.split_on]
    pieces = caption.split(shuffle.keep_separator, 2) if shuffle.keep_separator else [caption]
    parts = [[tag.strip() for tag in piece.split(separator) if tag.strip()] for piece in pieces]
    if len(parts) == 1:
        start = shuffle.position_start
        return parts[0][:start], parts[0][start:], []
    return parts[0], parts[1], parts[2] if len(parts) > 2 else []
