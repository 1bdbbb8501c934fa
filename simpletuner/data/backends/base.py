"""What the index asks of the place where files are: list folders, list a folder's files, read one.

A million files must be listed at each start, so the walk yields one digest per folder: the index looks at single files
only where a folder's digest differs from the one it remembers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

# In memory at once, for each thread that reads: more than an image of `MAX_PIXELS` takes in 8 bits.
MAX_FILE_BYTES = 1 << 29
NO_FILE, OUTSIDE, TOO_LARGE = -1, -2, -3
# Size of a file in a listing -> why it is not read.
NOT_READ = {
    NO_FILE: "not a regular file, or a link to nothing",
    OUTSIDE: "a link that leads out of the dataset's folder (follow_outside_links: true follows it)",
    TOO_LARGE: f"larger than {MAX_FILE_BYTES >> 20} MiB",
}


class FileStat(NamedTuple):
    """One file: if any part differs, its content is looked at again.

    Args:
        name: within its folder, as bytes: file names need not be text.
        size: bytes; of what is not read one of `NOT_READ`.
        mtime_ns: time of the last write.
        ctime_ns: time of the last change of content or attributes, which programs cannot set back; 0 where unknown.
        inode: number of the file, or 0; tells a replaced file from the one that it replaced.
    """

    name: bytes
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


@dataclass(frozen=True)
class Folder:
    """One folder of a dataset.

    Args:
        path: relative to the dataset's root, `/`-separated bytes, empty for the root.
        listing: digest of the names and signatures of its files; equal listings mean nothing changed.
        error: why it cannot be listed.
    """

    path: bytes
    listing: bytes = b""
    error: str | None = None


class UnusableFile(OSError):
    """What will be no image and no caption however often it is read; `str` of it is the reason."""


class Backend(Protocol):
    """A tree of files that is only ever read. Safe to use from several threads.

    Tables (Parquet, CSV) are trees too: their captions are files named like the image with `.txt` added.
    """

    @property
    def location(self) -> str:
        """The root, as the user knows it."""
        ...

    @property
    def identity(self) -> str:
        """Names the tree: two backends of equal identity list the same files."""
        ...

    @property
    def num_readers(self) -> int | None:
        """Files worth reading at the same time; None where the number of cores decides."""
        ...

    def folders(self) -> Iterator[Folder]:
        """Every folder below the root and the root itself, each once, in no particular order."""
        ...

    def files(self, folder: bytes) -> Iterator[FileStat]:
        """The images and caption files directly in a folder, in no particular order."""
        ...

    def read(self, path: bytes) -> bytes:
        """Content of a file.

        Raises:
            UnusableFile: it never can be.
            OSError: it cannot be read, or it changed while it was read.
        """
        ...


def content_number(data: bytes) -> int:
    """63 bits of a digest: stands for an inode in the signature of what is no file on a disk."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest()) >> 1


def listing_digest(files: Iterable[FileStat]) -> bytes:
    """Digest of a folder's listing, for backends whose listings are short or come in one order."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(b"%d %b %d %d %d %d " % (len(file.name), *file))
    return digest.digest()


def join(folder: bytes, name: bytes) -> bytes:
    """Path of a file from its folder's path and its name."""
    return folder + b"/" + name if folder else name
