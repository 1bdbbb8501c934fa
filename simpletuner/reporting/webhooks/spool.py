"""Messages that must arrive, on the disk until their service has them: one JSON file each, named by age.

A process that is killed leaves them for the next one on the same output folder.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, replace
from pathlib import Path

from simpletuner import storage, tempnames
from simpletuner.errors import DataError, Problem
from simpletuner.reporting.webhooks.messages import Message

REFUSED = "refused"


def created_at(name: str) -> float:
    """Seconds since 1970 at which the message of this file was made."""
    return int(name.partition("-")[0]) / 1e6


def message_id(name: str) -> str:
    """The id of the message in this file."""
    return name.partition("-")[2].removesuffix(".json")


class Spool:
    """The folder of one service.

    Args:
        folder: made when the first message comes.
        root: paths of images inside of it are stored relative to it, so that the folder of a run can be moved.
        is_new: the run is new: what is in the folder already belongs to another run, and is not sent with its own.
    """

    def __init__(self, folder: Path, root: Path, is_new: bool = False):
        self.folder, self._root = folder, root.absolute()
        self._names: list[str] | None = [] if is_new else None

    def add(self, message: Message) -> None:
        """Put a message on the disk.

        Raises:
            DataError: the disk is full or cannot be written.
        """
        names = self.names()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(Problem(f"cannot be created: {error.strerror}", file=str(self.folder))) from error
        name = f"{int(message.created * 1e6):020d}-{message.id}.json"
        paths = [Path(path).absolute() for path in message.images]
        images = tuple(str(path.relative_to(self._root) if path.is_relative_to(self._root) else path) for path in paths)
        # In ASCII: the name of an image's folder may not be UTF-8.
        storage.write_bytes(self.folder / name, json.dumps(asdict(replace(message, images=images))).encode())
        names.append(name)

    def names(self) -> list[str]:
        """Names of the messages that wait, oldest first; the list is the spool's own."""
        if self._names is None:
            tempnames.clean_stale(self.folder)
            self._names = sorted(path.name for path in self.folder.glob("*-*.json"))
        return self._names

    def read(self, name: str) -> Message | None:
        """A message; None if its file was moved away with its run.

        Raises:
            DataError: it is damaged, and no longer waits.
        """
        if not (self.folder / name).exists():
            self.names().remove(name)
            return None
        try:
            record = storage.read_json(self.folder / name)
            # Messages of an earlier version that still wait name their images "pictures".
            images = record.pop("images", None) or record.pop("pictures", ())
            return Message(**record, images=tuple(str(self._root / path) for path in images))
        except (DataError, TypeError, KeyError, AttributeError):
            self.reject(name)
            raise DataError(Problem(f"{name} cannot be read; moved to {self.folder / REFUSED}")) from None

    def remove(self, name: str) -> None:
        """The service has it. If the disk does not delete it, the next process sends it again."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)
        self.names().remove(name)

    def reject(self, name: str) -> None:
        """Move a message that the service will never take to a folder from which nothing is sent."""
        rejected = self.folder / REFUSED
        with contextlib.suppress(OSError):
            rejected.mkdir(parents=True, exist_ok=True)
            (self.folder / name).replace(rejected / name)
        self.names().remove(name)
