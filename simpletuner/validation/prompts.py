"""Which pictures validation draws: every prompt at every size, each with its own fixed seed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from simpletuner.errors import ConfigError, Problem

MAIN_SHORTNAME = "validation"
DEFAULT_SEED = 42


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
        config: read are `validation_prompt`, `validation_resolution`, `validation_seed`, `seed`.
        prompt_library: nickname -> prompt.
        size_multiple: pixels; sides are rounded to it.
        max_size: pixels; largest side that the family takes.

    Returns:
        The requests (none where there is no prompt), and what a person should know of them.

    Raises:
        ConfigError: a size that cannot be read or is too large.
    """
    prompts = {MAIN_SHORTNAME: config.validation_prompt} if config.validation_prompt else {}
    prompts.update(prompt_library or {})
    sizes, notices = rounded_sizes(parse_sizes(config.validation_resolution), size_multiple, max_size)
    seed = next((value for value in (config.validation_seed, config.seed) if value is not None), DEFAULT_SEED)
    requests = [
        PictureRequest(shortname, prompt, height, width, seed)
        for shortname, prompt in prompts.items()
        for height, width in sizes
    ]
    return requests, notices


def parse_sizes(text: str | int) -> list[tuple[int, int]]:
    """`"1024x1024,1280x768"` (width x height) or `64` -> [(height, width), ...] in pixels, without doubles."""
    sizes = [_parse_size(part.strip(), text) for part in str(text).split(",")]
    return list(dict.fromkeys(sizes))


def _parse_size(part: str, whole: str | int) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:\s*[xX×]\s*(\d+))?", part)  # noqa: RUF001 - people do type the sign
    width = int(match[1]) if match else 0
    height = int(match[2] or match[1]) if match else 0
    if not width or not height:
        raise ConfigError(
            Problem(
                f'"{whole}" is not a size, or a list of sizes',
                key="validation_resolution",
                allowed="a number of pixels (1024), WIDTHxHEIGHT (1280x768), or several with commas between",
            )
        )
    return height, width


def rounded_sizes(
    sizes: list[tuple[int, int]], multiple: int, max_size: int | None
) -> tuple[list[tuple[int, int]], list[str]]:
    """Sizes that the family can draw, and one notice for each that had to change.

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
                f"validation_resolution {width}x{height} is drawn at {new_width}x{new_height}: "
                f"this model's sides are multiples of {multiple}"
            )
        rounded.append((new_height, new_width))
    return list(dict.fromkeys(rounded)), notices
