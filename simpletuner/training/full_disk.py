"""A checkpoint that the disk does not take: clear up and try again, then wait for room where the user wants that.

The weights of a run stay in memory meanwhile, so nothing is lost by waiting. Only the main process writes; the others
wait for it as they do for every save.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from simpletuner import tempnames
from simpletuner.disk import DiskError
from simpletuner.errors import Problem
from simpletuner.reporting.events import Notice

if TYPE_CHECKING:
    from simpletuner.training.run import Session

T = TypeVar("T")

# Between two tries of a run that waits, and between two looks whether a signal came.
RETRY_SECONDS = 30.0
POLL_SECONDS = 0.5
# A fault of a mount that is over at once needs no second message.
FIRST_PAUSE_SECONDS = 1.0


def write_patiently(session: Session, step: int, what: str, write: Callable[[], T]) -> T:
    """What `write` returns. Where the disk is full or faulty, stale files are removed and it is called once more; with
    `pause_on_full_disk` then again and again until it succeeds or a signal comes.

    Args:
        step: where the run stands, for messages.
        what: is written, for messages: `checkpoint-100`.

    Raises:
        DiskError: the disk still refuses; whatever was committed before is untouched.
    """
    try:
        return write()
    except DiskError as error:
        if not error.may_pass:
            raise
        freed = clean_stale(session)
        text = f"{what} could not be written, and is tried again: {error.problems[0].message}"
        session.warn(f"{text}; {freed} stale files of earlier processes were removed")
    time.sleep(FIRST_PAUSE_SECONDS)
    is_reported = False
    while True:
        try:
            result = write()
            break
        except DiskError as error:
            if not (error.may_pass and session.pauses_on_full_disk):
                raise
            if not is_reported:
                text = f"the run is paused at step {step}: {what} {error.problems[0].message}"
                session.bus.emit(Notice("error", f"{text}. It continues when there is room ({session.output_dir})"))
                is_reported = True
            wait_for_disk_space(session, what, error)
    if is_reported:
        session.inform(f"the run continues: {what} is written")
    return result


def wait_for_disk_space(session: Session, what: str, error: DiskError) -> None:
    """Let time pass before the next try.

    Raises:
        DiskError: a signal came; the state of the run is lost with the process, since there is no room for it.
    """
    until = time.monotonic() + RETRY_SECONDS
    while time.monotonic() < until:
        if session.stop:
            problem = error.problems[0]
            message = f"stopped while it waited for room: {what} {problem.message}"
            fix = "free some space; the same command continues from the checkpoint before"
            raise DiskError(Problem(message, file=problem.file, fix=fix), error.number) from error
        time.sleep(POLL_SECONDS)


def clean_stale(session: Session) -> int:
    """Remove what dead processes left in the folders of the run; how many files and folders that were."""
    handled = tempnames.clean_stale_tree(session.output_dir, is_locked=True)
    return len(handled + tempnames.clean_stale_tree(session.cache_dir))
