"""Which pictures validation draws: every prompt at every size, each with its own fixed seed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from simpletuner.config.values import parse_sizes
from simpletuner.errors import ConfigError, Problem

MAIN_SHORTNAME = "validation"


@dataclass(frozen=True)
class PictureRequest:
    """One picture to draw.

    Args:
        shortname: names its files; the nickname of the prompt library, or `validation`.
        height: pixels.
        width: pixels.
        seed: of its own generator.
        index: counts the pictures of one prompt and size.
    """

    shortname: str
    prompt: str
    height: int
    width: int
    seed: int
    index: int = 0

    @property
    def size_text(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def file_stem(self) -> str:
        """The shortname as a file name can hold it."""
        return re.sub(r"[/\\\x00-\x1f]", "-", self.shortname)


def requests_from_config(
    config: Any, prompt_library: Mapping[str, str] | None, size_multiple: int, max_size: int | None = None
) -> tuple[list[PictureRequest], list[str]]:
    """Every prompt at every size of `validation_resolution`.

    Args:
        config: read are `validation_disable`, `validation_prompt`, `validation_resolution`, `validation_seed`, `seed`.
        prompt_library: nickname -> prompt.
        size_multiple: pixels; sides are rounded to it.
        max_size: pixels; largest side that the family takes.

    Returns:
        The requests (none where there is no prompt), and what a person should know of them.

    Raises:
        ConfigError: a size that is too large for the family.
    """
    if config.validation_disable:
        return [], []
    prompts = {MAIN_SHORTNAME: config.validation_prompt} if config.validation_prompt else {}
    prompts.update(prompt_library or {})
    sizes, notices = rounded_sizes(parse_sizes(config.validation_resolution), size_multiple, max_size)
    seed = config.seed if config.validation_seed is None else config.validation_seed
    requests = [
        PictureRequest(shortname, prompt, height, width, seed)
        for shortname, prompt in prompts.items()
        for height, width in sizes
    ]
    return requests, notices


def rounded_sizes(
    sizes: Sequence[tuple[int, int]], multiple: int, max_size: int | None
) -> tuple[list[tuple[int, int]], list[str]]:
    """(height, width) pairs that the family can draw, without doubles, and one notice for each that had to change.

    Raises:
        ConfigError: a side above `max_size`.
    """
    rounded, notices = [], []
    for height, width in sizes:
        new_height, new_width = (max(multiple, round(side / multiple) * multiple) for side in (height, width))
        if max_size is not None and max(new_height, new_width) > max_size:
            raise ConfigError(
                Problem(
                    f"{width}x{height} is larger than this model can draw",
                    key="validation_resolution",
                    allowed=f"sides up to {max_size} pixels",
                )
            )
        if (new_height, new_width) != (height, width):
            notices.append(
                f"{width}x{height} is drawn at {new_width}x{new_height}: this model's sides are multiples of {multiple}"
            )
        rounded.append((new_height, new_width))
    return list(dict.fromkeys(rounded)), notices
