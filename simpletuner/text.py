"""Text that comes from outside: how bytes become text, where a line ends, and how text is shown on one line.

Every file that a user writes is read by these rules: captions, tables, filters, configurations. Nothing is replaced
silently: bytes that are no text are an error with line and byte.
"""

from __future__ import annotations

import codecs
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

# Of the two marks that begin alike, the longer one first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
FALLBACK = "cp1252"
_LINE_END = re.compile(r"\r\n|\n|\r")
# Separators of other systems, which end no line here: vertical tab, form feed, the four of ASCII, NEL, LS and PS.
_SEPARATORS = re.compile("[\x0b\x0c\x1c-\x1f\x85\u2028\u2029]")
# All but tabs and line feeds; also what turns the direction of writing, and bytes that are no text.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LOGIN = re.compile(r"//[^/?#\s\"'<>]*@")
_SURROGATE = re.compile("[\ud800-\udfff]")
_CHUNK = 2**20
_MAX_DEPTH = 100
_MAX_HEADER_BYTES = 256 << 20


class NotText(ValueError):
    """Bytes or a text that cannot be used as text; `str` of it is the reason, with line and byte where known.

    Args:
        line: 1-based.
    """

    def __init__(self, reason: str, line: int | None = None):
        super().__init__(reason)
        self.line = line


def one_form(name: bytes) -> bytes:
    """A file's name or path with its accents composed (NFC): systems write `é` as one character or as two."""
    if name.isascii():
        return name
    try:
        return unicodedata.normalize("NFC", name.decode("utf-8")).encode()
    except UnicodeDecodeError:
        return name


def forms_of(name: bytes) -> tuple[bytes, ...]:
    """Every way in which systems write a name: as it is, and with its accents composed and decomposed."""
    if name.isascii():
        return (name,)
    try:
        text = name.decode("utf-8")
    except UnicodeDecodeError:
        return (name,)
    return tuple(dict.fromkeys((name, *(unicodedata.normalize(form, text).encode() for form in ("NFC", "NFD")))))


def read_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file that is small where it is sound.

    Raises:
        ValueError: it has more than `max_bytes`, of which no more is read.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"is larger than {max_bytes / 1e6:g} MB")
    return data


def decode(data: bytes) -> str:
    """UTF-8, or UTF-16 and UTF-32 where the bytes begin with their mark.

    Raises:
        NotText: they are something else, or hold a NUL character.
    """
    encoding = encoding_of(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        at = len(data) - len(error.object) + error.start  # a codec may have taken the mark away
        line = len(_LINE_END.findall(data[:at].decode(encoding, "replace"))) + 1
        raise _undecodable(encoding, line, at, data[at]) from None
    if (at := text.find("\0")) >= 0:
        raise _with_nul(len(_LINE_END.findall(text[:at])) + 1)
    return text


def read_json_text(text: str | bytes, *, finite: bool = True, **options: Any) -> Any:
    """The value in a JSON text that may be damaged or a stranger's.

    Args:
        finite: refuse NaN, infinities and numbers that become one, which are not JSON and which `int` fails on.
        options: of `json.loads`.

    Raises:
        ValueError: it is not JSON, has a number of too many digits, or is nested so deeply that what walks through the
            value later would fail.
    """
    if finite:
        options = {"parse_float": _finite, "parse_constant": _finite, **options}
    try:
        value = json.loads(text, **options)
        is_deep = _is_deep(value)
    except RecursionError:
        is_deep = True
    if is_deep:
        raise ValueError(f"more than {_MAX_DEPTH} levels of nesting")
    return value


def read_tensor_header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its tensors begin.

    Raises:
        ValueError: it has none, or one that is longer than any sound one.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        length = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if not 2 <= size <= min(length - 8, _MAX_HEADER_BYTES):
            raise ValueError("it does not hold the header whose length it gives")
        header = read_json_text(file.read(size))
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, 8 + size


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def _is_deep(value: Any) -> bool:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_MAX_DEPTH):
        parts = [part.values() if isinstance(part, dict) else part for part in level]
        level = [each for part in parts for each in part if isinstance(each, dict | list)]
        if not level:
            return False
    return True


def decode_lenient(data: bytes) -> tuple[str, str | None]:
    """(text, encoding) as `decode`; what is not UTF-8 is read as Windows-1252, which Latin-1 is a part of.

    Args:
        data: of a short text such as a caption.

    Returns:
        the encoding is None for Unicode, for which nothing had to be guessed.

    Raises:
        NotText: it is in neither; also where it looks like an encoding of Chinese, Japanese or Cyrillic letters.
    """
    try:
        return decode(data), None
    except NotText as error:
        if encoding_of(data) != "utf-8" or b"\0" in data or not _looks_western(data):
            raise
        try:
            return data.decode(FALLBACK), FALLBACK
        except UnicodeDecodeError:
            raise error from None


def encoding_of(start: bytes) -> str:
    """The encoding that the first bytes of a file declare; UTF-8 where they declare none."""
    return next((encoding for mark, encoding in _MARKS if start.startswith(mark)), "utf-8")


def check_encoding(path: Path) -> str:
    """The encoding of a file of any size, after reading all of it in parts.

    Raises:
        NotText: as `decode`.
        OSError: it cannot be read.
    """
    line, position = 1, 0
    with path.open("rb") as file:
        chunk = file.read(_CHUNK)
        encoding = encoding_of(chunk)
        decoder = codecs.getincrementaldecoder(encoding)()
        while True:
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                at = position + len(chunk) - len(error.object) + error.start
                raise _undecodable(encoding, line, at, error.object[error.start]) from None
            if (at := text.find("\0")) >= 0:
                raise _with_nul(line + text.count("\n", 0, at))
            if not chunk:
                return encoding
            line += text.count("\n")
            position += len(chunk)
            chunk = file.read(_CHUNK)


def bounded_lines(file: IO[str], limit: int) -> Iterator[str]:
    """The lines of a file, each with its end; NotText for one of more than `limit` characters, before it is read."""
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise NotText(f"line {number} has more than {limit:,} characters", number)
        yield line


def lines_of(text: str) -> list[str]:
    """The lines of a text without their ends. Only \\n, \\r\\n and \\r end one; `str.splitlines` knows eight more."""
    lines = _LINE_END.split(text)
    return lines[:-1] if not lines[-1] else lines


def without_separators(text: str) -> str:
    """`text` with a blank for each character that separates lines, fields or records elsewhere."""
    return _SEPARATORS.sub(" ", text)


def fault_in(text: str) -> str | None:
    """Why a text from JSON or the environment is none, or None."""
    if "\0" in text:
        return "holds a NUL character"
    if _SURROGATE.search(text):
        return "holds half of a surrogate pair, or bytes that are not UTF-8"
    return None


def for_terminal(text: str) -> str:
    """`text` with its lines, but control characters, which move the cursor or change colors, as escapes."""
    return _CONTROL.sub(lambda found: printable(found[0]), text)


def without_login(text: str) -> str:
    """`text` without the names and passwords in its addresses: `https://me:secret@host` -> `https://host`."""
    return _LOGIN.sub("//", text)


def has_control(text: str) -> bool:
    """Whether a name would break a line or a terminal: a line end or another control character."""
    return "\n" in text or "\t" in text or _CONTROL.search(text) is not None


def printable(text: str) -> str:
    """`text` on one line, for terminals and logs: control characters and undecodable bytes as escapes."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )


def count_text(count: int, one: str, many: str | None = None) -> str:
    """3, `file` -> `3 files`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _looks_western(data: bytes) -> bool:
    """Whether the bytes above ASCII stand between others, as accents do, and not in runs, as letters of CJK do."""
    letters = [letter for letter in data.decode(FALLBACK, "ignore") if letter.isalpha()]
    longest = max(map(len, re.findall(rb"[\x80-\xff]+", data)), default=0)
    return longest <= 3 and 2 * sum(not letter.isascii() for letter in letters) <= len(letters)


def _undecodable(encoding: str, line: int, position: int, byte: int) -> NotText:
    name = encoding.removesuffix("-sig").upper()
    return NotText(f"is not {name} text: line {line}, byte {position + 1} (0x{byte:02x})", line)


def _with_nul(line: int) -> NotText:
    return NotText(f"holds a NUL character in line {line}; UTF-16 and UTF-32 need their byte order mark", line)
