"""What no message to a user may show: Python's own notation, digests, numbers of bytes without a unit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps

from simpletuner.errors import SimpleTunerError
from simpletuner.reporting.events import Notice

_ERRORS = "|".join(("Key", "Value", "Type", "Attribute", "Index", "Assertion", "OS", "Runtime"))
FAULTS = {
    "a Python container": r"[\[({]\'|\(\d+,\)|\bdict_(keys|values)\(|\b(set|Counter|deque|frozenset)\(",
    "a Python object": r" object at 0x|<(class|function|module|enum|built-in) ",
    "a Python constructor": rf"\b(PosixPath|Path|tensor|array|dtype|torch\.Size|({_ERRORS})Error)\(|\bdtype=",
    "a Python constant": r"\b(True|False)\b|\bNone\b(?! of)",
    "a digest": r"\b(?=[0-9a-f]*\d)[0-9a-f]{32,}\b",
    "bytes without a unit": r"\b\d{1,3}(,\d{3}){2,} bytes|\b\d{7,} bytes",
}


def faults_of(text: str) -> list[str]:
    """What a message shows that it should not; quoted text and paths are the user's own."""
    own = re.sub(r'"[^"\n]*"', '""', text)
    # Word by word: a pattern with a slash in its middle looks at a long word once for each of its letters.
    own = re.sub(r"\S+", lambda word: "PATH" if "/" in word[0] else word[0], own)
    return [name for name, pattern in FAULTS.items() if re.search(pattern, own)]


@contextmanager
def recorded_messages() -> Iterator[list[str]]:
    """Every problem and notice that is made meanwhile, as it is shown."""
    seen: list[str] = []
    make_error, make_notice = SimpleTunerError.__init__, Notice.__init__

    @wraps(make_error)
    def error(self, problems):
        make_error(self, problems)
        seen.extend(problem.render() for problem in self.problems)

    @wraps(make_notice)
    def notice(self, *values, **named):
        make_notice(self, *values, **named)
        seen.append(self.text)

    SimpleTunerError.__init__, Notice.__init__ = error, notice  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        SimpleTunerError.__init__, Notice.__init__ = make_error, make_notice  # type: ignore[method-assign]
