"""Messages that must arrive, on the disk until their service has them: one JSON file each, named by age.

A process that is killed leaves them for the next one on the same output folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from simpletuner import storage
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
        root: paths of images inside of it are kept relative to it, so that the folder of a run can be moved.
        is_new: of a run that begins: what waits in the folder already is another run's, and is not sent with its own.
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
            raise DataError(Problem(f"cannot be made: {error.strerror}", file=str(self.folder))) from error
        name = f"{int(message.created * 1e6):020d}-{message.id}.json"
        images = tuple(self._relative(path) for path in message.images)
        # In ASCII: the name of an image's folder may be no UTF-8.
        storage.write_bytes(self.folder / name, json.dumps(asdict(replace(message, images=images))).encode())
        names.append(name)

    def names(self) -> list[str]:
        """Names of the messages that wait, oldest first; the list is the spool's own."""
        if self._names is None:
            storage.clean_stale(self.folder)
            self._names = sorted(path.name for path in self.folder.glob("*-*.json"))
        return self._names

    def read(self, name: str) -> Message | None:
        """A message; None where its file was moved away with its run, or is damaged: then it is skipped."""
        if not (self.folder / name).exists():
            self.names().remove(name)
            return None
        try:
            record = storage.read_json(self.folder / name)
            message = self._message(record)
        except (DataError, TypeError, KeyError, AttributeError):
            self.skipped(name)
            return None
        return replace(message, images=tuple(str(self._root / path) for path in message.images))

    def remove(self, name: str) -> None:
        """The service has it. Where the disk does not let go of it, the next process sends it again."""
        with contextlib.suppress(OSError):
            (self.folder / name).unlink(missing_ok=True)
        self.names().remove(name)

    def skipped(self, name: str) -> None:
        """Keep a message that the service will never take where nobody tries again."""
        aside = self.folder / REFUSED
        with contextlib.suppress(OSError):
            aside.mkdir(parents=True, exist_ok=True)
            (self.folder / name).replace(aside / name)
        self.names().remove(name)

    def _relative(self, path: str) -> str:
        absolute = Path(path).absolute()
        return str(absolute.relative_to(self._root) if absolute.is_relative_to(self._root) else absolute)

    @staticmethod
    def _message(record: Mapping[str, Any]) -> Message:
        # Messages of an earlier version that still wait name their images "pictures".
        paths = record["images"] if "images" in record else record["pictures"]
        return Message(**{key: value for key, value in record.items() if key != "pictures"} | {"images": tuple(paths)})
