"""Edits of captions that a user lists: a regular expression is removed, `s/expression/replacement/` replaces."""

from __future__ import annotations

import re
from pathlib import Path

from simpletuner.config.json_reader import parse_json
from simpletuner.errors import ConfigError
from simpletuner.text import decode, lines_of, read_file

MAX_FILE_BYTES = 10_000_000


def parse_filter(text: str) -> tuple[re.Pattern[str], str]:
    """(expression, replacement) of one edit; the character after `s` separates them, a backslash takes its meaning.

    Raises:
        ValueError: it is not a regular expression, or a replacement that is not closed or names a missing group.
    """
    expression, replacement = text, ""
    if len(text) > 1 and text[0] == "s" and not (text[1].isalnum() or text[1].isspace() or text[1] == "\\"):
        parts = re.split(rf"(?<!\\){re.escape(text[1])}", text)
        if len(parts) != 4 or parts[3]:
            raise ValueError(f'"{text}" is not of the form s/expression/replacement/')
        expression, replacement = (part.replace(f"\\{text[1]}", text[1]) for part in parts[1:3])
    if not expression:
        raise ValueError(f'"{text}" has no expression')
    try:
        pattern = re.compile(expression)
        re.sub(pattern, replacement, "")
        _check_groups(pattern, replacement)
    except (re.error, IndexError) as error:
        raise ValueError(f'"{text}" is not a regular expression: {error}') from None
    return pattern, replacement


def _check_groups(pattern: re.Pattern[str], replacement: str) -> None:
    """A replacement is only read where something is found: read it here, on a text that every expression finds."""
    re.sub(re.compile(f"(?:{pattern.pattern})|", pattern.flags), replacement, "")


def read_filter_file(path: Path) -> tuple[str, ...]:
    """The edits of a file: a JSON list of texts, or one per line.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        text = decode(read_file(path, MAX_FILE_BYTES))
    except OSError as error:
        raise ValueError(f'"{path}" cannot be read: {error.strerror}') from None
    except ValueError as error:
        raise ValueError(f'"{path}" {error}') from None
    if path.suffix.lower() != ".json":
        return tuple(line for line in lines_of(text) if line.strip())
    try:
        values = parse_json(text, str(path)).value
    except ConfigError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f'"{path}" is not a list of texts')
    return tuple(values)
