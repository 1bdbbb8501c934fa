"""What a piece of work costs, counted: the same on a busy machine, where a clock would say anything."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def calls_in(work: Callable[[], Any]) -> int:
    """Calls of functions, of Python and of C, that `work` makes in this thread."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def calls_in_program(code: str, *arguments: str) -> tuple[int, str]:
    """Calls that a new Python makes for `code`, imports among them, and what it prints."""
    counting = f"""
import contextlib, sys
from tests.costs import calls_in
def work():
    with contextlib.suppress(SystemExit):
        exec({code!r}, {{}})
count = calls_in(work)
print(count, file=sys.stderr)
"""
    command = [sys.executable, "-c", counting, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stderr), done.stdout
