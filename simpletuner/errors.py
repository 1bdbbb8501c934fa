"""Errors that a user can fix, and the exit code that each kind ends the program with.

Every such error prints as a block of text without a traceback: what was given, what is allowed, which key of which
file, what to do. `assert` and the built-in exceptions stay for our own mistakes, which do print a traceback.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EXIT_OK = 0
EXIT_CONFIG = 2
EXIT_DATA = 3
EXIT_DIVERGED = 4
EXIT_UPLOAD = 5
EXIT_HANGUP = 129
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
# Of a run that a signal has asked to leave.
EXITS_OF_SIGNALS = (EXIT_HANGUP, EXIT_INTERRUPTED, EXIT_TERMINATED)


def bytes_text(num_bytes: float) -> str:
    """1536 -> `1.5 KiB`; three digits at most before the unit."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def shape_text(shape: Sequence[int]) -> str:
    """(4, 8) -> `4 x 8`; a single number -> `1 number`."""
    return " x ".join(map(str, shape)) if len(shape) else "1 number"


def error_text(error: BaseException) -> str:
    """The message of an exception of a reader; a missing key alone gives only its name."""
    if isinstance(error, KeyError):
        return f"it has no {error.args[0] if error.args else 'such key'}"
    return " ".join(str(error).split()) or "it has another form"


def plain_value(value: Any) -> str:
    """A setting as people write it: `true`, `0.1`, `a, b`; `unset` where there is none."""
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain_value(item)}" for key, item in value.items()) or "nothing"
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return ", ".join(map(plain_value, value)) or "nothing"
    return str(value)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and how to fix it.

    Args:
        message: what was given and why it cannot be used, one or two sentences.
        key: the option or dataset key at fault, as the user writes it; a dataset key carries its path
            (`pseudo-camera-10k.crop_style`).
        file: the file that the value came from, as the user can open it.
        line: line in that file, 1-based, where known.
        allowed: what would be accepted.
        fix: what to do, as an instruction.
    """

    message: str
    key: str | None = None
    file: str | None = None
    line: int | None = None
    allowed: str | None = None
    fix: str | None = None

    def render(self) -> str:
        place = self.file or ""
        if self.file and self.line is not None:
            place = f"{self.file}:{self.line}"
        head = ": ".join(part for part in (place, self.key, self.message) if part)
        tail = [f"  allowed: {self.allowed}"] if self.allowed else []
        tail += [f"  fix: {self.fix}"] if self.fix else []
        return "\n".join([head, *tail])


class SimpleTunerError(Exception):
    """Base of all errors that are shown without a traceback."""

    exit_code = 1

    def __init__(self, problems: Problem | str | Sequence[Problem]):
        if isinstance(problems, str):
            problems = Problem(problems)
        self.problems: list[Problem] = [problems] if isinstance(problems, Problem) else list(problems)
        super().__init__(self.render())

    def render(self) -> str:
        return "\n".join(problem.render() for problem in self.problems)


class ConfigError(SimpleTunerError):
    """A configuration that cannot be used; found before anything is loaded or cached."""

    exit_code = EXIT_CONFIG


class MissingDependency(ConfigError):
    """An optional package that a chosen setting needs; names the extra to install."""


class DataError(SimpleTunerError):
    """Images, captions, caches, model files or disk space that stop the run."""

    exit_code = EXIT_DATA


class DivergedError(SimpleTunerError):
    """Training produced non-finite numbers several times in a row; the last checkpoint is untouched."""

    exit_code = EXIT_DIVERGED


class UploadError(SimpleTunerError):
    """An upload that the configuration requires did not succeed."""

    exit_code = EXIT_UPLOAD


class Interrupted(SimpleTunerError):
    """A signal asked the run to stop; it saved and left."""

    def __init__(self, message: str, exit_code: int = EXIT_INTERRUPTED):
        super().__init__(message)
        self.exit_code = exit_code


class Stopping(Exception):
    """No error: leaves off work that can wait (images, an evaluation) where the run is asked to stop.

    Whoever began the work catches it; the loop then saves and raises `Interrupted`.
    """
