"""Text fields whose keys act in the order in which they are pressed, and that complete the names of folders.

Textual inserts a letter as soon as a field sees it, but an editing key (Backspace, Home) first travels up to the
application, whose answer comes back later: who types fast gets another text than was typed. Here a field answers its
own editing keys itself.
"""

from __future__ import annotations

from pathlib import Path

from textual import events
from textual.suggester import Suggester
from textual.widget import Widget
from textual.widgets import Input, TextArea

MAX_NAMES = 5000  # of a folder; completing more would hold the screen up


async def run_own_binding(field: Widget, event: events.Key) -> None:
    """Run what a key means to a field at once, between the letters before and after it."""
    for binding in field._bindings.key_to_bindings.get(event.key, ()):
        if not binding.priority:
            event.stop()
            event.prevent_default()  # the key handler of the base class is not asked any more
            await field.run_action(binding.action)
            return


class TextField(Input):
    """One line of text."""

    async def _on_key(self, event: events.Key) -> None:
        await run_own_binding(self, event)


class LinesField(TextArea):
    """Several lines of text."""

    async def _on_key(self, event: events.Key) -> None:
        await run_own_binding(self, event)


class FolderSuggester(Suggester):
    """Completes the path of a folder as it is typed; Right or End takes what is suggested.

    Args:
        working_dir: what relative paths start from.
    """

    def __init__(self, working_dir: Path):
        super().__init__(use_cache=False, case_sensitive=True)
        self.working_dir = working_dir

    async def get_suggestion(self, value: str) -> str | None:
        typed_folder, slash, start = value.rpartition("/")
        if not value or (not slash and value == "~"):
            return None
        folder = self.working_dir / Path(typed_folder + slash).expanduser() if slash else self.working_dir
        names = folder_names(folder, start)
        return f"{typed_folder}{slash}{names[0]}/" if names else None


def folder_names(folder: Path, start: str) -> list[str]:
    """Names of the folders in `folder` that begin with `start`, sorted; hidden ones only where a dot was typed."""
    found = []
    try:
        for number, path in enumerate(folder.iterdir()):
            if number >= MAX_NAMES:
                break
            is_shown = start.startswith(".") or not path.name.startswith(".")
            if is_shown and path.name.startswith(start) and path.is_dir():
                found.append(path.name)
    except (OSError, ValueError):  # no such folder, no permission, a name with a NUL
        return []
    return sorted(found)
