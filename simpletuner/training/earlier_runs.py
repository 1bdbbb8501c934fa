"""`earlier-runs/`: where everything goes that another run, or an abandoned branch of this one, left in the folder.

Nothing is deleted. The move is noted in `run_history.json` before it begins and finished by the next start if the
process dies in between, so a file in the output folder is never taken for one of another run.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.disk import disk_errors
from simpletuner.errors import DataError, Problem
from simpletuner.training.run_files import RECORDS, belongings
from simpletuner.training.run_history import HISTORY_FILE, RunHistory, read_run_history

EARLIER_DIR = "earlier-runs"


@dataclass(frozen=True)
class Move:
    """A move into `earlier-runs/`.

    Args:
        folder: its name there.
        after_step: what lies after this step is moved; None: everything.
        history: of the run that is moved, as JSON; None where it has none.
    """

    folder: str
    after_step: int | None
    history: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return {"folder": self.folder, "after_step": self.after_step, "history": self.history}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Move:
        name, after_step = Path(str(data["folder"])).name, data["after_step"]
        if name in ("", "..") or not isinstance(after_step, int | None):
            raise ValueError("not a move into earlier-runs/")
        return cls(name, after_step, data["history"])


def move_earlier(
    output_dir: Path, history: RunHistory, after_step: int | None, reports: Mapping[str, bytes] | None = None
) -> str | None:
    """Make `history` the folder's, and move what does not belong to it.

    Args:
        after_step: what lies after this step is moved; None: everything.
        reports: files of the earlier run that this start has replaced already, by name.

    Returns:
        One line about what was moved; None where there was nothing.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    found = belongings(output_dir, after_step)
    if not found:
        write_run_history(output_dir, history)
        return None
    earlier = read_run_history(output_dir)
    move = Move(_free_name(output_dir, earlier, after_step), after_step, earlier.to_json() if earlier else None)
    folder = _new_folder(output_dir, move.folder)
    for name, content in (reports or {}).items():
        storage.write_bytes(folder / name, content)
    write_run_history(output_dir, history, move)
    _carry_out(output_dir, move)
    write_run_history(output_dir, history)
    what = "what an earlier run left here" if after_step is None else f"what this run made after step {after_step}"
    return f"{what} is now in {folder} ({len(found)} files and folders); nothing was deleted"


def move_aside(output_dir: Path, path: Path) -> Path:
    """Move one file or folder out of the way; returns the folder where it is now.

    Raises:
        DataError: the disk cannot be written.
    """
    folder = _new_folder(output_dir, _free_name(output_dir, None, None))
    storage.move(path, folder / path.name)
    return folder


def finish_move(output_dir: Path) -> str | None:
    """Finish the move over which a process died; returns one line about it, None where there was none.

    Raises:
        DataError: the disk is full or cannot be written.
    """
    try:
        noted = storage.read_json(output_dir / HISTORY_FILE)
        move = Move.from_json(noted["moving"])
        history = RunHistory.from_json(noted)
    except (DataError, KeyError, TypeError, ValueError):
        return None
    _carry_out(output_dir, move)
    write_run_history(output_dir, history)
    return f"a move to {output_dir / EARLIER_DIR / move.folder} that was interrupted is finished"


def write_run_history(output_dir: Path, history: RunHistory, move: Move | None = None) -> None:
    """Replace `run_history.json`."""
    storage.write_json(output_dir / HISTORY_FILE, history.to_json() | ({"moving": move.to_json()} if move else {}))


def earlier_size(output_dir: Path) -> tuple[int, int]:
    """(folders, bytes) in `earlier-runs/`."""
    folder = output_dir / EARLIER_DIR
    if not folder.is_dir():
        return 0, 0
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(path.is_dir() for path in folder.iterdir()), sum(path.stat().st_size for path in files)


def delete_command(output_dir: Path) -> str:
    """The shell command that deletes `earlier-runs/`."""
    return f"rm -r {shlex.quote(str(output_dir / EARLIER_DIR))}"


def _carry_out(output_dir: Path, move: Move) -> None:
    folder = output_dir / EARLIER_DIR / move.folder
    folder.mkdir(parents=True, exist_ok=True)
    if move.history is not None:
        storage.write_json(folder / HISTORY_FILE, move.history)
    if move.after_step is not None:  # the run goes on with them, less what lies after the step
        for name in RECORDS:
            if (output_dir / name).is_file() and not (folder / name).exists():
                storage.write_bytes(folder / name, (output_dir / name).read_bytes())
    for path in belongings(output_dir, move.after_step):
        target = folder / path.relative_to(output_dir)
        target.parent.mkdir(parents=True, exist_ok=True)
        storage.move(path, target)


def _new_folder(output_dir: Path, name: str) -> Path:
    """Make a folder in `earlier-runs/`, which must be a folder on the disk of the run: files are renamed, not copied.

    Raises:
        DataError: it is something else, or cannot be written; nothing was moved.
    """
    parent = output_dir / EARLIER_DIR
    with disk_errors(parent):
        if os.path.lexists(parent) and not (parent.is_dir() and parent.stat().st_dev == output_dir.stat().st_dev):
            message = "is not a folder on the same disk, so nothing can be moved there; nothing was changed"
            raise DataError(Problem(message, file=str(parent), key="output_dir", fix="rename or remove it"))
        (parent / name).mkdir(parents=True)
    return parent / name


def _free_name(output_dir: Path, history: RunHistory | None, after_step: int | None) -> str:
    number = 1 + len(list((output_dir / EARLIER_DIR).glob("*")))
    what = "" if after_step is None else f"-after-step-{after_step}"
    while True:
        name = f"{number}-{history.run_id if history else 'run'}{what}"
        if not (output_dir / EARLIER_DIR / name).exists():
            return name
        number += 1
