"""Changing single values in a JSON text and leaving every other character alone: comments, order, spacing.

A file that somebody wrote by hand is read by eyes again; writing it again would lose what the eyes look for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from simpletuner.config.json_reader import BLANK, Document, JsonPath, parse_json

INDENT = "    "

# What may stand behind a value on its line without being more than a remark on it.
_REST_OF_LINE = re.compile(r"[ \t]*(?://[^\n]*|/\*[^\n]*?\*/[ \t]*)?(?=\n|$)")


def json_text(value: Any, level: int = 0) -> str:
    """A value as people write it: 4 blanks a level, lists of plain values on one line, small numbers as 4e-5."""
    inner = INDENT * (level + 1)
    if isinstance(value, dict) and value:
        members = [f"{inner}{json_text(key)}: {json_text(item, level + 1)}" for key, item in value.items()]
        return "{\n" + ",\n".join(members) + f"\n{INDENT * level}}}"
    if isinstance(value, list | tuple):
        if any(isinstance(item, dict | list | tuple) for item in value):
            items = [f"{inner}{json_text(item, level + 1)}" for item in value]
            return "[\n" + ",\n".join(items) + f"\n{INDENT * level}]"
        return "[" + ", ".join(json_text(item) for item in value) + "]"
    if isinstance(value, float):
        return _number_text(value)
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def set_value(text: str, path: JsonPath, value: Any) -> str:
    """The text with `value` at `path`: in place of the value there, else as the last member or item around it.

    Args:
        path: keys and list positions; all but the last one must be there.

    Raises:
        ConfigError: the text is not JSON.
    """
    return _with_its_line_ends(text, lambda plain: _set_value(plain, path, value))


def _set_value(text: str, path: JsonPath, value: Any) -> str:
    document = parse_json(text, "")
    if path in document.spans:
        span = document.spans[path]
        return text[: span.value] + _placed(value, _indent_at(text, span.start), _unit(text)) + text[span.end :]
    return _insert_last(text, document, path, value)


def remove_value(text: str, path: JsonPath) -> str:
    """The text without the member or item at `path`, its comma, and what is remarked on it on the same line.

    Raises:
        ConfigError: the text is not JSON.
        KeyError: nothing stands at `path`.
    """
    return _with_its_line_ends(text, lambda plain: _remove_value(plain, path))


def _remove_value(text: str, path: JsonPath) -> str:
    document = parse_json(text, "")
    span = document.spans[path]
    start, end = span.start, span.end
    comma = _comma_after(text, end)
    if comma is not None:
        end = comma + 1
    # A member alone on its lines goes with them; between others, only itself.
    line_start = text.rfind("\n", 0, start) + 1
    rest = _REST_OF_LINE.match(text, end)
    if rest and not text[line_start:start].strip():
        start, end = line_start, min(rest.end() + 1, len(text))
    shortened = text[:start] + text[end:]
    previous = _last_sibling_before(document, path)
    if comma is None and previous is not None:
        before = _comma_after(shortened, previous)
        assert before is not None
        shortened = shortened[:before] + shortened[before + 1 :]
    return shortened


def _insert_last(text: str, document: Document, path: JsonPath, value: Any) -> str:
    container, unit = document.spans[path[:-1]], _unit(text)
    siblings = [span for other, span in document.spans.items() if other[:-1] == path[:-1] and other]
    last = max(siblings, key=lambda span: span.end, default=None)
    line = _indent_at(text, container.start if last is None else last.start)
    indent = line + unit if last is None else line
    written = _placed(value, indent, unit)
    if isinstance(path[-1], str):
        written = f"{json_text(path[-1])}: {written}"
    if last is None:
        return f"{text[: container.value + 1]}\n{indent}{written}\n{line}{text[container.end - 1 :]}"
    if text[text.rfind("\n", 0, last.start) + 1 : last.start].strip():  # all on one line
        return f"{text[: last.end]}, {written}{text[last.end :]}"
    rest = _REST_OF_LINE.match(text, last.end)
    at = rest.end() if rest else last.end
    return f"{text[: last.end]},{text[last.end : at]}\n{indent}{written}{text[at:]}"


def _comma_after(text: str, at: int) -> int | None:
    blank = BLANK.match(text, at)
    assert blank is not None
    return blank.end() if text[blank.end() : blank.end() + 1] == "," else None


def _last_sibling_before(document: Document, path: JsonPath) -> int | None:
    """Where the value before the one at `path` ends, in the same object or list."""
    start = document.spans[path].start
    ends = [
        span.end for other, span in document.spans.items() if other and other[:-1] == path[:-1] and span.end <= start
    ]
    return max(ends, default=None)


def _placed(value: Any, indent: str, unit: str) -> str:
    """A value whose first line stands behind `indent` in a text that indents each level by `unit`."""
    first, *rest = json_text(value).split("\n")
    levels = [(len(line) - len(line.lstrip(" "))) // len(INDENT) for line in rest]
    return "\n".join(
        [first, *(f"{indent}{unit * level}{line.lstrip(' ')}" for level, line in zip(levels, rest, strict=True))]
    )


def _indent_at(text: str, at: int) -> str:
    """What the line of a position begins with."""
    line = text[text.rfind("\n", 0, at) + 1 : at]
    return line[: len(line) - len(line.lstrip())]


def _unit(text: str) -> str:
    """What a text indents a level by: its first line that is indented tells, comments apart."""
    found = re.search(r"""^[ \t]+(?=["{\[])""", text, re.MULTILINE)
    return found.group() if found and len(found.group()) <= 2 * len(INDENT) else INDENT


def _with_its_line_ends(text: str, change: Callable[[str], str]) -> str:
    """What `change` makes of a text; one whose lines end as on Windows keeps these ends."""
    if 0 < text.count("\n") == text.count("\r\n"):
        return change(text.replace("\r\n", "\n")).replace("\n", "\r\n")
    return change(text)


def _number_text(value: float) -> str:
    if value == int(value) and abs(value) < 1e15:
        return str(int(value))
    if abs(value) >= 1e-3:
        return repr(value)
    mantissa, _, exponent = f"{value:e}".partition("e")
    short = f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return short if float(short) == value else repr(value)
