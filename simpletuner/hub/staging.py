"""A folder with exactly what one upload sends: links to files that are committed already, which cost no room."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from simpletuner.reporting.events import SavedImage


@dataclass(frozen=True)
class Upload:
    """One commit on the Hub.

    Args:
        folder: what is sent; removed when it is there.
        step: optimizer steps done.
        is_last: the end of the run, not a checkpoint.
        images: of the card.
        eval_loss: newest at that time.
    """

    folder: Path
    step: int
    is_last: bool
    images: tuple[SavedImage, ...] = ()
    eval_loss: float | None = None


def stage(
    folder: Path,
    files: Mapping[str, Path],
    step: int,
    is_last: bool,
    images: tuple[SavedImage, ...],
    eval_loss: float | None,
) -> Upload:
    """Fill a new folder with links to `files`: path inside of it -> file.

    Rotation may remove a checkpoint while it is on its way; a link keeps its content. The folder is no result of the
    run and may be lost at any time, so it needs no commit.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(source, target)
    return Upload(folder, step, is_last, images, eval_loss)


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system has them, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
