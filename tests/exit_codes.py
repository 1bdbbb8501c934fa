"""How a command of this package ends, where a test calls it in its own process."""

from __future__ import annotations

from collections.abc import Callable


def exit_code_of(command: Callable[[], object]) -> int:
    """The exit code that a command leaves with in this process: that of `SystemExit`, where it raises one."""
    try:
        command()
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    return 0
