"""How a shell calls this program, so that every command that is printed can be pasted.

A newcomer has not activated the environment that `train.sh` made: there `simpletuner` alone is not found.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shlex
import shutil
import sys
from pathlib import Path

NAME = "simpletuner"
VERBS = (
    *("cache", "check", "configure", "convert", "diffsynth", "doctor", "examples", "export", "extract-vlm-embeds"),
    *("generate", "import", "models", "monitor", "options", "plan", "report", "sft", "train", "verify-resume"),
)
_COMMAND = re.compile(rf"(?<![\w./-])(?<!-m ){NAME} (?=(?:{'|'.join(VERBS)})\b)")


@functools.cache
def program() -> str:
    """The name where the shell finds this installation by it, else the path of its script, quoted for a shell."""
    script = Path(sys.executable).with_name(NAME)
    found = shutil.which(NAME)
    if found and (not script.exists() or Path(found).samefile(script)):
        return NAME
    if not script.exists():
        return f"{shlex.quote(sys.executable)} -m {NAME}"
    with contextlib.suppress(FileNotFoundError):  # the working folder was deleted
        here = Path.cwd()
        script = script.relative_to(here) if script.is_relative_to(here) else script
    return shlex.quote(str(script))


def pasteable(text: str) -> str:
    """A text with each command of this program in it as the shell takes it."""
    name = program()
    return text if name == NAME else _COMMAND.sub(lambda found: f"{name} ", text)
