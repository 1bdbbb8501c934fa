"""Numbers as people read them, and columns that line up."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

# Prints one line.
Say = Callable[[str], None]

_NUMBER = re.compile(r"[\d.,]+(?![\w.-]).*")  # no name that begins with a digit


def short_count(count: float) -> str:
    """3.76e9 -> `3.76 B`: parameters."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Lines of left-aligned columns; numbers, with or without a unit, are aligned on the right."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [_padded(cell, width) for cell, width in zip(row, widths, strict=True)]
        lines.append((indent + "  ".join(cells)).rstrip())
    return lines


def _padded(cell: str, width: int) -> str:
    return cell.rjust(width) if _NUMBER.fullmatch(cell) else cell.ljust(width)
