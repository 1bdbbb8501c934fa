"""Kinds of values that options and dataset keys share: how text becomes a number, a truth value, a list or a size.

Files and command lines give many values as text ("4e-5", "20", "true"). These types say once how such text is read.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, Field, SecretStr

from simpletuner.text import fault_in, read_json_text

TRUE_WORDS = ("true", "yes", "on", "1")
FALSE_WORDS = ("false", "no", "off", "0")
# Of a file or folder, on every usual file system.
MAX_NAME_BYTES = 255
# Beyond these a number overflows somewhere: 64-bit counters, float32 weights.
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = 1e30


class Size(NamedTuple):
    """An image's size in pixels, height first as tensors have it."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


def read_bool(value: Any) -> Any:
    """Text that means yes or no becomes a bool; numbers other than 0 and 1 are not truth values."""
    if isinstance(value, str):
        word = value.strip().lower()
        if word in TRUE_WORDS:
            return True
        if word in FALSE_WORDS:
            return False
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError("must be true or false")


def read_int(value: Any) -> Any:
    """Whole numbers, also written "20", 20.0 or "1e3"; truth values are not numbers."""
    if isinstance(value, bool):
        raise ValueError("must be a whole number")
    if isinstance(value, str):
        try:
            value = int(value.strip())
        except ValueError:
            value = read_float(value)
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        return int(value)
    if not isinstance(value, int):
        raise ValueError("must be a whole number")
    if abs(value) > LARGEST_INT:
        raise ValueError(f"must be a whole number of at most {LARGEST_INT:.2g}")
    return value


def read_float(value: Any) -> Any:
    """Finite numbers, also written "4e-5"; truth values are not numbers."""
    if isinstance(value, str):
        try:
            value = float(value.strip())
        except ValueError:
            raise ValueError("must be a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("must be a number")
    return _meaningful(float(min(max(value, -(10**40)), 10**40) if isinstance(value, int) else value))


def _meaningful(value: float) -> float:
    """A number that weights, which are float32 at best, can be computed with."""
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    if abs(value) > LARGEST_FLOAT or 0 < abs(value) < 1 / LARGEST_FLOAT:
        raise ValueError(f"must be 0, or between {1 / LARGEST_FLOAT:g} and {LARGEST_FLOAT:g} in size")
    return value


def require_meaningful(value: Any, name: str = "") -> None:
    """Raise for numbers that mean nothing, anywhere inside lists and objects.

    Raises:
        ValueError: names the first one.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            require_meaningful(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            require_meaningful(item, name)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        try:
            read_float(value)
        except ValueError as error:
            raise ValueError(f"{name} {error}" if name else str(error)) from None


def read_text(value: Any) -> Any:
    """Text; a bare number is taken as its text (`validation_resolution: 1024`)."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise ValueError("must be text")
    if fault := fault_in(value):
        raise ValueError(fault)
    return value


def read_name(value: Any) -> Any:
    """Text on one line: line ends and tabs, which files hold where a text was wrapped, are blanks."""
    return re.sub(r"\s*[\n\r\t]\s*", " ", read_text(value)).strip()


def read_secret(value: Any) -> Any:
    """Text that is never shown; the fault of one does not show it either."""
    return value if isinstance(value, SecretStr) else SecretStr(read_text(value))


def read_secret_json(value: Any) -> Any:
    """JSON that may hold secrets, as it stands or as text -> a text that is never shown; other text is a path."""
    if isinstance(value, dict | list | tuple):
        return SecretStr(json.dumps(value))
    if isinstance(value, SecretStr):
        return value
    if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
        return SecretStr(value)
    return read_path(value)


def read_words(value: Any) -> Any:
    """A list of words, also written as one text with commas or blanks between them."""
    if isinstance(value, str):
        return tuple(value.replace(",", " ").split())
    if isinstance(value, list | tuple):
        return tuple(value)
    raise ValueError("must be a list, or one text with commas")


def read_text_or_list(value: Any) -> Any:
    """One text, or a list of texts -> a tuple of texts."""
    if isinstance(value, list | tuple):
        return tuple(read_text(item) for item in value)
    return (read_text(value),)


def read_numbers_of_layers(value: Any) -> Any:
    """Whole numbers from 0, a list or text with commas ("7,8,9", "[7, 8, 9]") -> ascending, each once."""
    if isinstance(value, str):
        value = value.strip().removeprefix("[").removesuffix("]").split(",")
    items = value if isinstance(value, list | tuple) else [value]
    numbers = sorted({read_int(item.strip() if isinstance(item, str) else item) for item in items})
    if not numbers or numbers[0] < 0:
        raise ValueError("must be layer indices, counted from 0")
    return tuple(numbers)


def read_sigmas(value: Any) -> Any:
    """Noise levels, a list or text with commas -> ascending sigmas in [0, 1]; thousandths where any is above 1."""
    if value is None or value == "":
        return None
    items = value.split(",") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    numbers = sorted({read_float(item.strip() if isinstance(item, str) else item) for item in items})
    if not numbers or numbers[0] < 0 or numbers[-1] > 1000:
        raise ValueError("must be numbers from 0 (data) to 1 or to 1000 (noise)")
    return tuple(number / 1000 for number in numbers) if numbers[-1] > 1 else tuple(numbers)


def read_arguments(value: Any) -> Any:
    """`"eps=1e-8,weight_decay=0.1"`, JSON or an object -> a dict; numbers and truth values in the text are seen."""
    arguments = _read_arguments(value)
    require_meaningful(arguments)
    return arguments


def _read_arguments(value: Any) -> Any:
    if isinstance(value, dict):
        return value
    if not isinstance(value, str):
        raise ValueError('must be text such as "weight_decay=0.1,eps=1e-8", or an object')
    if value.lstrip().startswith("{"):
        try:
            return read_json_text(value)
        except ValueError as error:
            raise ValueError(f"is not JSON: {error}") from None
    arguments: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in value.split(","))):
        name, equals, text = part.partition("=")
        if not equals or not name.strip():
            raise ValueError(f'"{part}" is not of the form name=value')
        arguments[name.strip().removeprefix("--")] = _read_scalar(text.strip())
    return arguments


def _read_scalar(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def read_path(value: Any) -> Any:
    """A path as text; `~` is the home folder."""
    if isinstance(value, Path):
        return value
    if not isinstance(value, str):
        raise ValueError("must be a path, as text")
    if "\0" in value:
        raise ValueError("must be a path without a NUL character")
    if any(len(part.encode("utf-8", "replace")) > MAX_NAME_BYTES for part in value.split("/")):
        raise ValueError("holds a name that is too long for any disk")
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError("begins with the home folder of a user who does not exist") from None


def parse_sizes(text: str) -> list[Size]:
    """Image sizes from `"1024"`, `"1280x768"` (width x height) or several of them with commas.

    Raises:
        ValueError: a part is neither, or not positive.
    """
    sizes = []
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        width, times, height = part.partition("x")
        try:
            size = Size(int(height if times else width), int(width))
        except ValueError:
            raise ValueError(f'"{part}" is not a size such as 1024 or 1280x768') from None
        if min(size) < 8 or max(size) > 16384:
            raise ValueError(f'"{part}" is outside of 8 to 16384 pixels')
        sizes.append(size)
    if not sizes:
        raise ValueError("names no size")
    return sizes


def read_sizes(value: Any) -> Any:
    """The text that `parse_sizes` takes, checked."""
    text = read_text(value)
    parse_sizes(text)
    return text


def read_interval(value: Any) -> Any:
    """The text of a whole number above 0, or the word `auto`."""
    text = str(value).strip().lower()
    if text == "auto" or (text.isdecimal() and int(text) > 0):
        return text
    raise ValueError('must be a whole number above 0, or "auto"')


def read_checkpointing(value: Any) -> Any:
    """A truth value; `auto` has a place of its own."""
    if isinstance(value, str) and value.strip().lower() == "auto":
        raise ValueError('set it to true, and gradient_checkpointing_interval to "auto"')
    return read_bool(value)


def read_memory(value: Any) -> Any:
    """The text of a number of GB above 0, or the word `auto`."""
    text = str(value).strip().lower()
    if text != "auto" and read_float(value) <= 0:
        raise ValueError('must be a number of GB above 0, or "auto"')
    return text


Checkpointing = Annotated[bool, BeforeValidator(read_checkpointing)]
Interval = Annotated[str, BeforeValidator(read_interval)]
Memory = Annotated[str, BeforeValidator(read_memory)]
Bool = Annotated[bool, BeforeValidator(read_bool)]
Int = Annotated[int, BeforeValidator(read_int)]
Float = Annotated[float, BeforeValidator(read_float)]
Text = Annotated[str, BeforeValidator(read_text)]
Name = Annotated[str, BeforeValidator(read_name)]
Secret = Annotated[SecretStr, BeforeValidator(read_secret)]
SecretJsonOrPath = Annotated[SecretStr | Path, BeforeValidator(read_secret_json)]
Sizes = Annotated[str, BeforeValidator(read_sizes)]
FilePath = Annotated[Path, BeforeValidator(read_path)]
Arguments = Annotated[dict[str, Any], BeforeValidator(read_arguments)]
Fraction = Annotated[float, BeforeValidator(read_float), Field(ge=0.0, le=1.0)]
Layers = Annotated[tuple[int, ...], BeforeValidator(read_numbers_of_layers)]
TextOrList = Annotated[tuple[str, ...], BeforeValidator(read_text_or_list)]
