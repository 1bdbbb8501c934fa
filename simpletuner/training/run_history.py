"""Which run a file belongs to: a run gets an id at its first start and writes it into everything that it keeps.

A run that goes back to an earlier checkpoint begins a new branch after that step. So a file is this run's if it carries
the run's id and a branch that the run was on at the file's step. What was written before runs had ids carries none; the
first start that resumes it adopts it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simpletuner import storage
from simpletuner.errors import DataError, Problem, error_text
from simpletuner.training.run_files import step_of

HISTORY_FILE = "run_history.json"
HISTORY_KEY = "run_history"  # in the metadata of manifests


@dataclass(frozen=True)
class Mark:
    """What a file says of its origin."""

    run_id: str
    branch: str

    def to_json(self) -> dict[str, str]:
        return {"run": self.run_id, "branch": self.branch}

    @classmethod
    def from_json(cls, data: Any) -> Mark | None:
        """None where `data` is no mark: a file of a version that knew none."""
        if isinstance(data, Mapping) and isinstance(data.get("run"), str) and isinstance(data.get("branch"), str):
            return cls(data["run"], data["branch"])
        return None


@dataclass(frozen=True)
class Branch:
    """A stretch of a run.

    Args:
        after_step: its first step comes after this one.
    """

    id: str
    after_step: int


@dataclass(frozen=True)
class RunHistory:
    """The id of a run and the branches that lead to where it is.

    Args:
        branches: `after_step` ascends; each one ends where the next begins.
        adopts_unmarked: files without a mark in its folder are its own.
    """

    run_id: str
    branches: tuple[Branch, ...]
    adopts_unmarked: bool = False

    @classmethod
    def new(cls, after_step: int = 0, adopts_unmarked: bool = False) -> RunHistory:
        """A run that begins after a step: 0, or that of another run's checkpoint."""
        return cls(secrets.token_hex(4), (Branch(secrets.token_hex(4), after_step),), adopts_unmarked)

    @property
    def mark(self) -> Mark:
        """What files carry that are written now."""
        return Mark(self.run_id, self.branches[-1].id)

    def owns(self, mark: Mark | None, step: int) -> bool:
        """Whether a file of `step` with this mark is of this run, at this point of its history."""
        if mark is None:
            index = 0 if self.adopts_unmarked else None
        elif mark.run_id != self.run_id:
            return False
        else:
            index = next((i for i, branch in enumerate(self.branches) if branch.id == mark.branch), None)
        if index is None:
            return False
        later = self.branches[index + 1 :]
        return not later or step <= later[0].after_step

    def branched(self, after_step: int) -> RunHistory:
        """The history of a run that goes back to `after_step`."""
        kept = [branch for branch in self.branches if branch.after_step < after_step] or [self.branches[0]]
        return replace(self, branches=(*kept, Branch(secrets.token_hex(4), after_step)))

    def to_json(self) -> dict[str, Any]:
        branches = [{"id": branch.id, "after_step": branch.after_step} for branch in self.branches]
        return {"run": self.run_id, "branches": branches, "adopts_unmarked": self.adopts_unmarked}

    @classmethod
    def from_json(cls, data: Any) -> RunHistory:
        """What `to_json` gave.

        Raises:
            ValueError: it is something else.
        """
        try:
            branches = tuple(Branch(str(each["id"]), int(each["after_step"])) for each in data["branches"])
            history = cls(str(data["run"]), branches, bool(data["adopts_unmarked"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the history of a run: {error_text(error)}") from error
        if not branches:
            raise ValueError("the history of a run has no branch")
        return history


class FolderGuard:
    """Notices that the output folder was renamed, deleted or replaced under a run: a path that is written to is made
    again silently, and what goes there is then lost to the run.

    Args:
        output_dir: as it is now.
    """

    def __init__(self, output_dir: Path):
        self.output_dir = output_dir
        _hold_inode(self)
        self._history = read_run_history(output_dir)
        self._place: tuple[int, int] | None = None
        self._place = self._look()

    def note_history(self) -> None:
        """Know the folder by the history that the run has written into it."""
        self._history = read_run_history(self.output_dir)

    def is_there(self) -> bool:
        """Whether the folder is the one that the run began in."""
        place = self._look()
        is_new = place is not None and place != self._place
        if is_new and self._history is not None and read_run_history(self.output_dir) == self._history:
            self._place = place  # some network file systems renumber
        return place == self._place

    def require(self) -> None:
        """Raise where it is not.

        Raises:
            DataError: says so.
        """
        if not self.is_there():
            raise DataError(
                Problem(
                    "was renamed, deleted or replaced while the run was writing to it",
                    file=str(self.output_dir),
                    key="output_dir",
                    fix="give it its name back if it was renamed, and start again: the run resumes from its last "
                    "checkpoint",
                )
            )

    def _look(self) -> tuple[int, int] | None:
        try:
            found = self.output_dir.stat()
        except FileNotFoundError:
            return None
        except OSError:  # a network that is away for a moment is no rename
            return self._place
        return found.st_dev, found.st_ino


def _hold_inode(guard: FolderGuard) -> None:
    """Hold the folder open while `guard` lives: file systems give a deleted folder's inode to the next new one."""
    with contextlib.suppress(OSError):  # not there, or Windows, which reuses none
        weakref.finalize(guard, os.close, os.open(guard.output_dir, os.O_RDONLY))


def history_of(manifest: storage.Manifest) -> RunHistory | None:
    """The history of the run that committed a folder; None where it does not say."""
    try:
        return RunHistory.from_json(manifest.metadata[HISTORY_KEY])
    except (KeyError, ValueError):
        return None


def read_run_history(output_dir: Path) -> RunHistory | None:
    """The history of the run in a folder; None where there is none, or it is damaged."""
    try:
        return RunHistory.from_json(storage.read_json(output_dir / HISTORY_FILE))
    except (DataError, ValueError):
        return None


def find_run_history(output_dir: Path, checkpoints: list[Path]) -> tuple[RunHistory, list[str]]:
    """The history of the run in a folder, and what there is to report about it.

    Where `run_history.json` is missing, as after a copy of the checkpoints alone, it is read from them. Checkpoints
    without a history were written by an earlier version: they are adopted. Where they are of several runs, the history
    is a new one, which owns none of them.

    Args:
        checkpoints: committed folders.
    """
    known = read_run_history(output_dir)
    if known is not None:
        return known, []
    histories = []
    for path in checkpoints:
        try:
            histories.append((path, history_of(storage.read_manifest(path))))
        except DataError:
            continue
    marked = [(path, history) for path, history in histories if history is not None]
    if marked and len({history.run_id for _, history in marked}) == 1:
        path, history = max(marked, key=lambda pair: step_of(pair[0]))  # only that one knows all branches
        return history, [f"{HISTORY_FILE} is missing: run {history.run_id} is continued from what {path.name} says"]
    if histories and not marked:
        history = RunHistory.new(adopts_unmarked=True)
        text = f"{output_dir} was written by an earlier version of simpletuner: adopted as run {history.run_id}"
        return history, [text]
    return RunHistory.new(adopts_unmarked=not histories), []
