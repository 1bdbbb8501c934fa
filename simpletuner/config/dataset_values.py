"""Kinds of values that only dataset entries have: aspects with weights, shuffling of tags, filters of captions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator

from simpletuner.config.values import read_bool, read_float, read_int, read_words
from simpletuner.spelling import did_you_mean

SEPARATORS = {"comma": ",", "space": " ", "period": "."}


class AspectBucket(NamedTuple):
    """An aspect ratio (width / height) and how often it is sampled, relative to the others."""

    aspect: float
    weight: float = 1.0


@dataclass(frozen=True)
class TagShuffle:
    """Variants of a caption whose tags are in another order.

    Args:
        count: shuffled variants of each caption.
        seed: of the shuffling; None takes that of the run.
        split_on: what stands between tags: a key of `SEPARATORS`.
        position_start: so many first tags stay in their place.
        include_original: the caption as it is written is one of the variants.
        keep_separator: text between parts of a caption: tags before the first stay in front, those after a second stay
            at the end. It is never trained.
        dropout: probability of each tag that does not stay, to be left away from a variant.
    """

    count: int = 1
    seed: int | None = None
    split_on: str = "comma"
    position_start: int = 0
    include_original: bool = True
    keep_separator: str | None = None
    dropout: float = 0.0


def read_aspect_buckets(value: Any) -> Any:
    """A list of numbers, or of objects with `aspect_bucket` and `weight` -> a tuple of `AspectBucket`."""
    if not isinstance(value, list | tuple):
        raise ValueError("must be a list")
    return tuple(_read_aspect(item) for item in value)


def _read_aspect(item: Any) -> AspectBucket:
    if isinstance(item, AspectBucket):
        return item
    weight = 1.0
    if isinstance(item, dict):
        _refuse_unknown(item, ("aspect_bucket", "weight"))
        if "aspect_bucket" not in item:
            raise ValueError("has an entry without aspect_bucket")
        item, weight = item["aspect_bucket"], read_float(item.get("weight", 1.0))
    aspect = read_float(item)
    if aspect <= 0:
        raise ValueError("holds an aspect ratio that is not above 0")
    if weight < 0:
        raise ValueError("holds a weight below 0")
    return AspectBucket(aspect, weight)


def read_tag_shuffle(value: Any) -> Any:
    """`{"enable": true, "count": 3, ...}` -> `TagShuffle`; false, or an object that is not enabled -> None."""
    if value is None or value is False or isinstance(value, TagShuffle):
        return value or None
    if not isinstance(value, dict):
        raise ValueError('must be an object such as {"enable": true, "count": 3}')
    _refuse_unknown(value, ("enable", *(each.name for each in fields(TagShuffle))))
    if not read_bool(value.get("enable", False)):
        return None
    split_on = value.get("split_on", "comma")
    if split_on not in SEPARATORS:
        raise ValueError(f"split_on must be one of {', '.join(SEPARATORS)}")
    count, start = read_int(value.get("count", 1)), read_int(value.get("position_start", 0))
    if not 1 <= count <= 1000 or start < 0:
        raise ValueError("count must be 1 to 1000, and position_start at least 0")
    seed = value.get("seed")
    original = read_bool(value.get("include_original", True))
    separator, dropout = value.get("keep_separator"), read_float(value.get("dropout", 0.0))
    if separator is not None and not (isinstance(separator, str) and separator.strip()):
        raise ValueError("keep_separator must be a text such as |||")
    if separator is not None and SEPARATORS[split_on].strip() and SEPARATORS[split_on] in separator:
        raise ValueError(f"keep_separator must not contain what split_on means ({SEPARATORS[split_on]})")
    if not 0 <= dropout < 1:
        raise ValueError("dropout must be at least 0 and below 1")
    return TagShuffle(count, None if seed is None else read_int(seed), split_on, start, original, separator, dropout)


def _refuse_unknown(value: dict[str, Any], known: tuple[str, ...]) -> None:
    for key in value:
        if key not in known:
            hint = did_you_mean(str(key), known)
            raise ValueError(f'there is no "{key}" in it' + (f"; {hint}" if hint else ""))


SKIPPABLE = ("vae", "aspect", "metadata", "text")


def read_skipped(value: Any) -> Any:
    """Words with commas or blanks between them, all of `SKIPPABLE` -> a tuple of them."""
    words = read_words(value)
    for word in words:
        if word not in SKIPPABLE:
            question = did_you_mean(str(word), SKIPPABLE)
            hint = f"; {question}" if question else ""
            raise ValueError(f'"{word}" is none of {", ".join(SKIPPABLE)}{hint}')
    return words


def read_pixel_counts(value: Any) -> Any:
    """A whole number or a list of some, each above 0 -> a tuple of them."""
    counts = tuple(read_int(each) for each in (value if isinstance(value, list | tuple) else [value]))
    if not counts or min(counts) < 1:
        raise ValueError("must be a number of pixels, or a list of some")
    return counts


def read_count_weights(value: Any) -> Any:
    """`{"0": 1, "2": 0.5}` or `0=1,2=0.5` -> weights by whole number, at least one above 0."""
    if isinstance(value, str):
        value = dict(part.split("=", 1) for part in value.split(",") if "=" in part) or None
    if not isinstance(value, Mapping):
        raise ValueError('must be an object such as {"0": 1, "1": 2}')
    weights = {read_int(count): read_float(weight) for count, weight in value.items()}
    if any(count < 0 for count in weights) or any(weight < 0 for weight in weights.values()):
        raise ValueError("must hold numbers from 0 on")
    if not any(weights.values()):
        raise ValueError("must hold a weight above 0")
    return weights


AspectBuckets = Annotated[tuple[AspectBucket, ...], BeforeValidator(read_aspect_buckets)]
Shuffle = Annotated[TagShuffle | None, BeforeValidator(read_tag_shuffle)]
CountWeights = Annotated[dict[int, float], BeforeValidator(read_count_weights)]
PixelCounts = Annotated[tuple[int, ...], BeforeValidator(read_pixel_counts)]
Words = Annotated[tuple[str, ...], BeforeValidator(read_skipped)]
