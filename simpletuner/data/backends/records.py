"""Images that rows name, as a tree of files: each row's target, or its n-th reference, under the name of the row.

An image may be in many rows and lie anywhere. The instructions are files beside the targets, as in every table, and
target and reference of a row have one name, by which they are paired as those of two folders are.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpletuner.data.backends.base import FileStat, Folder, content_number, join, listing_digest
from simpletuner.data.backends.local import CAPTION_SUFFIX, LocalBackend, file_numbers
from simpletuner.data.records import Record
from simpletuner.data.tables import joined


class RecordsBackend:
    """See `Backend`.

    Args:
        records: rows with equally many references.
        number: of the reference that is shown, from 0; None shows the targets, with the instructions.
        location: table or folder of the rows.
        identity: of the tree.
    """

    def __init__(self, records: Sequence[Record], number: int | None, location: Path, identity: str):
        self.location = str(location)
        self.identity = identity
        self.num_readers = None
        self._disk = LocalBackend(Path("/"), follows_outside=True)
        self._folders: dict[bytes, list[bytes]] = defaultdict(list)
        self._images: dict[bytes, Path] = {}
        self._captions: dict[bytes, bytes] = {}
        for record in records:
            image = record.target if number is None else record.references[number]
            folder, name = place_of(record, image, location)
            self._folders[folder].append(name)
            self._images[join(folder, name)] = image
            if number is None:
                text = joined(record.captions).encode()
                self._captions[join(folder, name + CAPTION_SUFFIX.encode())] = text

    def folders(self) -> Iterator[Folder]:
        for folder in sorted(self._folders):
            yield Folder(folder, listing_digest(self.files(folder)))

    def files(self, folder: bytes) -> Iterator[FileStat]:
        for name in self._folders.get(folder, ()):
            yield FileStat(name, *file_numbers(self._images[join(folder, name)]))
            caption = self._captions.get(join(folder, name + CAPTION_SUFFIX.encode()))
            if caption is not None:
                yield FileStat(name + CAPTION_SUFFIX.encode(), len(caption), 0, 0, content_number(caption))

    def read(self, path: bytes) -> bytes:
        if path in self._captions:
            return self._captions[path]
        return self._disk.read(os.fsencode(self._images[path]))


def place_of(record: Record, image: Path, location: Path) -> tuple[bytes, bytes]:
    """(folder, name) of one of a row's images in the tree."""
    return os.fsencode(_folder_of(record, location)), os.fsencode(record.name + image.suffix)


def _folder_of(record: Record, location: Path) -> str:
    """The table of a row below the folder of all tables; empty for rows of one table or of a plain folder."""
    if not location.is_dir() or record.file == location:
        return ""
    return str(record.file.relative_to(location))


class RecordFiles:
    """The files of embeddings that rows name, by the names of their targets in the tree.

    Args:
        records: rows with equally many references.
        location: table or folder of the rows.
        is_dropped: those for dropped captions.
    """

    def __init__(self, records: Sequence[Record], location: Path, is_dropped: bool):
        self.table = location
        self._files: dict[str, str] = {}
        for record in records:
            files = record.prompt_files
            if is_dropped:
                files = (record.dropped_prompt_file,) if record.dropped_prompt_file else ()
            if files:
                path = os.fsdecode(join(*place_of(record, record.target, location)))
                self._files[path] = joined([str(file) for file in files])

    @property
    def digest(self) -> str:
        """Changes when other files are named."""
        return hashlib.sha256(repr(sorted(self._files.items())).encode()).hexdigest()

    def take(self, paths: Sequence[str]) -> list[str | None]:
        """The files of each image, apart by U+001E."""
        return [self._files.get(path) for path in paths]
