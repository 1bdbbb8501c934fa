"""JSON with the line of every value, so that each error can say where the value stands.

The standard library's reader forgets positions and silently keeps the last of two equal keys. This one takes JSON plus
`//` and `/* */` comments, and refuses everything else with line and column.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from simpletuner.errors import ConfigError, Problem
from simpletuner.text import NotText, decode, printable, read_file

JsonPath = tuple[str | int, ...]

BLANK = re.compile(r"(?:[ \t\r\n]+|//[^\n]*|/\*.*?\*/)*", re.DOTALL)
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
_PLAIN_TEXT = re.compile(r'[^"\\\x00-\x1f]*')
_WORDS = {"true": True, "false": False, "null": None}
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_MAX_DEPTH = 100
MAX_BYTES = 50_000_000
_MAX_DIGITS = 1000
_QUOTES = 'JSON uses double quotes: "key": "value"'


class Span(NamedTuple):
    """Where a value stands, as positions in the text; `start` is its key where it is an object's member."""

    start: int
    value: int
    end: int


@dataclass(frozen=True)
class Document:
    """A JSON file's content.

    Args:
        lines: 1-based line of each value (for objects' members: of their key).
        spans: where each value stands, for those who change the text.
    """

    file: str
    value: Any
    lines: Mapping[JsonPath, int] = field(default_factory=dict)
    spans: Mapping[JsonPath, Span] = field(default_factory=dict)

    def line(self, *path: str | int) -> int | None:
        """Line of the value at `path`, or of the nearest value around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path)


def read_json_file(path: Path, shown: str | None = None, key: str | None = None) -> Document:
    """Read a JSON file.

    Args:
        shown: the file's name in errors.
        key: the option that named the file.

    Raises:
        ConfigError: it cannot be read, or is not JSON; with line and column.
    """
    return parse_json(read_text_file(path, shown, key), shown or str(path))


def read_text_file(path: Path, shown: str | None = None, key: str | None = None) -> str:
    """A text file's content; ConfigError where it cannot be read."""
    shown = shown or str(path)
    try:
        data = read_file(path, MAX_BYTES)
    except OSError as error:
        raise ConfigError(Problem(f"cannot be read: {error.strerror}", key=key, file=shown)) from error
    except ValueError as error:
        raise ConfigError(Problem(str(error), key=key, file=shown)) from error
    if data.startswith(b"\xef\xbb\xbf"):
        fix = "save it as UTF-8 without BOM"
        raise ConfigError(Problem("starts with a byte order mark (line 1, column 1)", file=shown, line=1, fix=fix))
    try:
        return decode(data)
    except NotText as error:
        raise ConfigError(Problem(str(error), file=shown, line=error.line, fix="save it as UTF-8")) from error


def parse_json(text: str, file: str) -> Document:
    """Parse JSON text; `file` is its name in errors.

    Raises:
        ConfigError: with line and column of the first error.
    """
    return _Reader(text, file).read()


class _Reader:
    def __init__(self, text: str, file: str):
        self.text = text
        self.file = file
        self.position = 0
        self.lines: dict[JsonPath, int] = {}
        self.spans: dict[JsonPath, Span] = {}
        self.line_ends = [match.start() for match in re.finditer("\n", text)]

    def read(self) -> Document:
        self.skip_blank()
        if self.position == len(self.text):
            self.fail("the file is empty", fix="it must hold one JSON object or list")
        value = self.read_value(())
        self.skip_blank()
        if self.position < len(self.text):
            self.fail(f"{self.here()} after the end of the JSON value")
        return Document(self.file, value, self.lines, self.spans)

    def fail(self, message: str, fix: str | None = None, at: int | None = None) -> NoReturn:
        at = self.position if at is None else at
        line = self.line_of(at)
        column = at - (self.text.rfind("\n", 0, at) + 1) + 1
        raise ConfigError(Problem(f"{message} (line {line}, column {column})", file=self.file, line=line, fix=fix))

    def line_of(self, at: int) -> int:
        return bisect.bisect_left(self.line_ends, at) + 1

    def here(self) -> str:
        """What stands at the position, for messages."""
        if self.position >= len(self.text):
            return "the end of the file"
        return f'"{printable(self.text[self.position])}"'

    def skip_blank(self) -> None:
        match = BLANK.match(self.text, self.position)
        self.position = match.end() if match else self.position
        if self.text.startswith("/*", self.position):
            self.fail("a comment that starts with /* is not closed")

    def read_value(self, path: JsonPath) -> Any:
        if len(path) > _MAX_DEPTH:
            self.fail(f"more than {_MAX_DEPTH} levels of nesting")
        self.lines.setdefault(path, self.line_of(self.position))
        at = self.position
        start = self.text[at : at + 1]
        if start == "{":
            value: Any = self.read_object(path)
        elif start == "[":
            value = self.read_list(path)
        else:
            value = self.read_string() if start == '"' else self.read_scalar()
        self.spans[path] = Span(at, at, self.position)
        return value

    def read_object(self, path: JsonPath) -> dict[str, Any]:
        members: dict[str, Any] = {}
        self.open_bracket()
        while self.text[self.position : self.position + 1] != "}":
            at = self.position
            if self.text[at : at + 1] == "'":
                self.fail("single quotes", fix=_QUOTES)
            if self.text[at : at + 1] != '"':
                self.fail(f"{self.here()} where a key in double quotes was expected", fix=_QUOTES)
            key = self.read_string()
            if key in members:
                first = self.lines[(*path, key)]
                self.fail(f'"{key}" is given twice, first in line {first}', fix="keep one of them", at=at)
            self.lines[(*path, key)] = self.line_of(at)
            self.skip_blank()
            if self.text[self.position : self.position + 1] != ":":
                self.fail(f'{self.here()} where ":" was expected after "{key}"')
            self.position += 1
            self.skip_blank()
            members[key] = self.read_value((*path, key))
            self.spans[(*path, key)] = self.spans[(*path, key)]._replace(start=at)
            self.next_item("}")
        self.position += 1
        return members

    def read_list(self, path: JsonPath) -> list[Any]:
        items: list[Any] = []
        self.open_bracket()
        while self.text[self.position : self.position + 1] != "]":
            items.append(self.read_value((*path, len(items))))
            self.next_item("]")
        self.position += 1
        return items

    def open_bracket(self) -> None:
        self.position += 1
        self.skip_blank()

    def next_item(self, closing: str) -> None:
        """Step over the comma to the next item, or stop at the closing bracket."""
        end = self.position
        self.skip_blank()
        if self.text[self.position : self.position + 1] == closing:
            return
        if self.text[self.position : self.position + 1] != ",":
            is_cut_off = self.position == len(self.text)
            fix = f'close it with "{closing}"' if is_cut_off else f"put a comma at the end of line {self.line_of(end)}"
            self.fail(f'{self.here()} where "," or "{closing}" was expected', fix)
        comma = self.position
        self.position += 1
        self.skip_blank()
        if self.text[self.position : self.position + 1] == closing:
            self.fail(f'a comma before "{closing}"', fix="remove the comma after the last item", at=comma)

    def read_string(self) -> str:
        at = self.position
        self.position += 1
        parts = []
        while True:
            match = _PLAIN_TEXT.match(self.text, self.position)
            assert match is not None
            parts.append(match.group())
            self.position = match.end()
            char = self.text[self.position : self.position + 1]
            if char == '"':
                self.position += 1
                return "".join(parts)
            if char != "\\":
                self.fail("a text without its closing quote", fix="close it on its own line; \\n is a new line", at=at)
            parts.append(self.read_escape())

    def read_escape(self) -> str:
        letter = self.text[self.position + 1 : self.position + 2]
        if letter in _ESCAPES and letter:
            self.position += 2
            return _ESCAPES[letter]
        digits = self.text[self.position + 2 : self.position + 6]
        if letter != "u" or not re.fullmatch(r"[0-9a-fA-F]{4}", digits):
            self.fail(f"\\{letter} is not an escape in JSON", fix="write a backslash as \\\\")
        self.position += 6
        code = int(digits, 16)
        low = re.match(r"\\u([dD][c-fC-F][0-9a-fA-F]{2})", self.text[self.position :])
        if 0xD800 <= code < 0xDC00 and low:
            self.position += 6
            code = 0x10000 + ((code - 0xD800) << 10) + (int(low.group(1), 16) - 0xDC00)
        if 0xD800 <= code < 0xE000:
            self.fail("half of a surrogate pair")
        return chr(code)

    def read_scalar(self) -> Any:
        for word, value in _WORDS.items():
            if self.text.startswith(word, self.position):
                self.position += len(word)
                return value
        match = _NUMBER.match(self.text, self.position)
        if match:
            return self.read_number(match)
        if self.text.startswith("'", self.position):
            self.fail("single quotes", fix=_QUOTES)
        fix = 'write texts as "text", numbers as 0.5, truth values as true or false'
        self.fail(f"{self.here()} where a value was expected", fix=fix)

    def read_number(self, match: re.Match[str]) -> int | float:
        if self.text[match.end() : match.end() + 1].isdigit():
            self.fail("a number that begins with 0", fix="write it without the 0")
        if match.end() - match.start() > _MAX_DIGITS:
            self.fail(f"a number of more than {_MAX_DIGITS} digits")
        self.position = match.end()
        return float(match.group()) if match.group(1) or match.group(2) else int(match.group())
