"""Bringing an index up to date with its folder: only what is new or changed is read.

The walk yields one digest per folder; files are compared one by one only in folders whose digest differs. New and
changed files are read once, in a thread pool: hashed, decoded to the last pixel, and measured. Whatever cannot be used
gets a row with the reason; files are never touched. Work is committed as it goes, so a scan that is killed goes on
from there.

Where every image is encoded before training, a PNG is not decoded here too: its checksums are compared. The table
`undecoded` remembers these rows for a scan that must know more.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from simpletuner.data.backends.base import NOT_READ, Backend, Folder, UnusableFile, join
from simpletuner.data.captions import CAPTION_SUFFIXES, MAX_CAPTION_BYTES, TEXT_VERSION, decode_caption, name_note
from simpletuner.data.transforms import UNREAD_SUFFIXES, UnusableImage, decoder_version, image_facts
from simpletuner.errors import DataError, Problem, bytes_text
from simpletuner.hardware import available_cores
from simpletuner.text import NotText, one_form, printable

# An image that decodes; one that does not, until it or the decoder changes; one to be tried again at each scan.
OK, BROKEN, UNREADABLE = "ok", "broken", "unreadable"

CountFiles = Callable[[int], None]

# Files per task of the pool: handing over a task costs as much as decoding a small image from a disk.
_TASK_FILES = 16
# Files of up to this size on average, of which nothing is decoded, take Python's time alone: threads only hinder.
_SMALL_BYTES = 64 << 10
# A transaction ends with so many files, or after so long with large ones.
_COMMIT_FILES = 1024
_COMMIT_SECONDS = 5.0
_UNDECODED = "FROM undecoded JOIN files USING (id) WHERE live"


@dataclass(frozen=True)
class FileState:
    """A path relative to the root, and the signature under which it was seen (`FileStat`)."""

    path: bytes
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @property
    def parts(self) -> tuple[bytes, bytes]:
        """Stem and suffix in one form: what a text, a mask and a reference are found by."""
        return os.path.splitext(one_form(self.path))  # noqa: PTH122 - names are bytes, Path is text

    @property
    def suffix(self) -> str:
        return os.path.splitext(os.fsdecode(self.path))[1].lower()  # noqa: PTH122 - as above

    @property
    def is_text(self) -> bool:
        return self.suffix in CAPTION_SUFFIXES


@dataclass(frozen=True)
class Finding:
    """What looking at one file gave.

    Args:
        status: `OK`, `BROKEN` or `UNREADABLE`.
        reason: why it is not `OK`; of one that is, what there is to note.
        digest: sha256 of the content.
        height: of an image, pixels, upright.
        width: of an image, pixels, upright.
        text: of a caption file.
        is_decoded: False for an image whose checksums alone were compared.
    """

    file: FileState
    status: str
    reason: str | None = None
    digest: bytes | None = None
    height: int | None = None
    width: int | None = None
    text: str | None = None
    is_decoded: bool = True


def update_files(
    database: sqlite3.Connection, backend: Backend, progress: CountFiles | None = None, decodes: bool = True
) -> None:
    """Bring `folders` and `files` up to date; the catalog is dropped where anything changed.

    Args:
        progress: called with the number of files looked at so far.
        decodes: decode each image; see `image_facts`.
    """
    with database:  # one transaction: each waits for the disk
        _forget_old_texts(database)
        _retry_failures(database)
        looks_again = decodes and has_undecoded(database)
        if looks_again:
            database.execute(f"UPDATE folders SET listing = NULL WHERE id IN (SELECT folder {_UNDECODED})")
    known = {path: (key, listing) for key, path, listing in database.execute("SELECT id, path, listing FROM folders")}
    num_done = 0
    # Pillow warns of large images and odd metadata on stderr; the report says what matters.
    num_threads = backend.num_readers or _num_threads()
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads, thread_name_prefix="scan") as pool:
        warnings.simplefilter("ignore")
        for folder in backend.folders():
            key, listing = known.pop(folder.path, (None, None))
            if folder.error is not None and folder.error not in NOT_READ.values():
                _require_unknown(database, backend, folder)
            if folder.error is None and listing == folder.listing:
                continue
            for num_files in _update_folder(database, backend, pool, key, folder, decodes):
                num_done += num_files
                if progress:
                    progress(num_done)
    if known:
        _forget_folders(database, [key for key, _ in known.values()])
    if looks_again:
        with database:
            database.execute("DELETE FROM undecoded")


def has_undecoded(database: sqlite3.Connection) -> bool:
    """Whether the checksums alone of some image were compared."""
    return database.execute(f"SELECT 1 {_UNDECODED} LIMIT 1").fetchone() is not None


def _require_unknown(database: sqlite3.Connection, backend: Backend, folder: Folder) -> None:
    """Raise where a folder that cannot be listed, or one below it, has images: they are not gone, and training without
    them would be another run.

    Raises:
        DataError: names the folder and what it held.
    """
    below = folder.path + b"/" if folder.path else b""
    counted = database.execute(
        "SELECT count(*) FROM files WHERE live AND NOT is_text AND status = 'ok' AND (? = 0 OR substr(path, 1, ?) = ?)",
        [len(below), len(below), below],
    )
    if num_images := counted.fetchone()[0]:
        name = printable(os.fsdecode(folder.path)) or "."
        raise DataError(
            Problem(
                f"folder {name} cannot be listed: {folder.error}; it held {num_images} images at the last start",
                file=backend.location,
                fix="check the disk, its mount and the folder's permissions, and start again; if the images are "
                "really gone, remove the folder",
            )
        )


def _forget_old_texts(database: sqlite3.Connection) -> None:
    """Make the scan read caption files again where an earlier version read them by other rules."""
    if database.execute("SELECT value FROM facts WHERE name = 'texts'").fetchone() == (TEXT_VERSION,):
        return
    texts = "FROM files WHERE live AND is_text"
    if database.execute(f"SELECT 1 {texts} LIMIT 1").fetchone():
        database.execute("DELETE FROM catalogue")
        database.execute(f"UPDATE folders SET listing = NULL WHERE id IN (SELECT folder {texts})")
        database.execute("UPDATE files SET live = 0 WHERE live AND is_text")
    database.execute("INSERT OR REPLACE INTO facts VALUES ('texts', ?)", [TEXT_VERSION])


def _retry_failures(database: sqlite3.Connection) -> None:
    """Make the scan look again at files that may be readable now."""
    stored = database.execute("SELECT value FROM facts WHERE name = 'decoder'").fetchone()
    is_same_decoder = stored == (decoder_version(),)
    parameters = (UNREADABLE, UNREADABLE if is_same_decoder else BROKEN)
    failed = "FROM files WHERE live AND status != 'ok' AND status IN (?, ?)"
    if is_same_decoder and database.execute(f"SELECT 1 {failed} LIMIT 1", parameters).fetchone() is None:
        return  # the usual start writes nothing
    database.execute(f"UPDATE folders SET listing = NULL WHERE id IN (SELECT folder {failed})", parameters)
    # Retired, they are new to the comparison with the disk.
    database.execute(f"UPDATE files SET live = 0 WHERE id IN (SELECT id {failed})", parameters)
    database.execute("INSERT OR REPLACE INTO facts VALUES ('decoder', ?)", [decoder_version()])


def _update_folder(
    database: sqlite3.Connection,
    backend: Backend,
    pool: ThreadPoolExecutor,
    key: int | None,
    folder: Folder,
    decodes: bool,
) -> Iterator[int]:
    """Bring one folder up to date; yields the number of files looked at since the last time.

    The listing is remembered last: after a kill the folder is compared again, and finds the rows that were committed.
    """
    with database:
        database.execute("DELETE FROM catalogue")
        if key is None:
            key = database.execute("INSERT INTO folders (path) VALUES (?)", [folder.path]).lastrowid
        database.execute("UPDATE folders SET listing = NULL, error = ? WHERE id = ?", [folder.error, key])
        if folder.error is not None:
            database.execute("UPDATE files SET live = 0 WHERE live AND folder = ?", [key])
            return
        _compare(database, backend, key, folder.path, decodes)
    task_files = 1 if backend.num_readers else _TASK_FILES
    findings: list[Finding] = []
    committed = time.monotonic()
    for part in _look_at(backend, pool, _changed_files(database, task_files), decodes):
        findings += part
        if len(findings) >= _COMMIT_FILES or time.monotonic() > committed + _COMMIT_SECONDS:
            with database:
                _store(database, key, findings)
            findings, committed = [], time.monotonic()
        yield len(part)
    with database:
        _store(database, key, findings)
        database.execute("UPDATE folders SET listing = ? WHERE id = ?", [folder.listing, key])


def _compare(database: sqlite3.Connection, backend: Backend, key: int | None, folder: bytes, decodes: bool) -> None:
    """Leave the new and changed files of a folder, and those still to be decoded, in the table `changed`; retire the
    rows of files that are gone."""
    columns = "path, size, mtime_ns, ctime_ns, inode"
    database.execute(f"CREATE TEMP TABLE IF NOT EXISTS changed (path BLOB PRIMARY KEY, {columns[6:]}) WITHOUT ROWID")
    database.execute("DELETE FROM changed")
    database.executemany(
        "INSERT OR REPLACE INTO changed VALUES (?, ?, ?, ?, ?)",
        ((join(folder, file.name), *file[1:]) for file in backend.files(folder)),
    )
    gone = "live AND folder = ? AND path NOT IN (SELECT path FROM changed)"
    database.execute(f"UPDATE files SET live = 0 WHERE {gone}", [key])
    known = "live AND folder = ?" + (" AND id NOT IN (SELECT id FROM undecoded)" if decodes else "")
    same = f"({columns}) IN (SELECT {columns} FROM files WHERE {known})"
    database.execute(f"DELETE FROM changed WHERE {same}", [key])


def _changed_files(database: sqlite3.Connection, task_files: int) -> Iterator[list[FileState]]:
    """What `_compare` left, in tasks; paged, since rows are written while this reads on."""
    last = b""
    while True:
        query = "SELECT * FROM changed WHERE path > ? ORDER BY path LIMIT ?"
        page = [FileState(*row) for row in database.execute(query, [last, _COMMIT_FILES])]
        if not page:
            return
        last = page[-1].path
        yield from (page[start : start + task_files] for start in range(0, len(page), task_files))


def _look_at(
    backend: Backend, pool: ThreadPoolExecutor, tasks: Iterator[list[FileState]], decodes: bool
) -> Iterator[list[Finding]]:
    """Findings in the order of the files; a bounded number of tasks waits at any time."""
    pending: deque[Future[list[Finding]]] = deque()
    waits_for_disk = backend.num_readers is not None
    for files in tasks:
        if not (waits_for_disk or pending) and _is_quick(files, decodes):
            started, cpu_started = time.perf_counter(), time.thread_time()
            findings = _look_at_each(backend, files, decodes)
            waits_for_disk = time.thread_time() - cpu_started < (time.perf_counter() - started) / 2
            yield findings
            continue
        pending.append(pool.submit(_look_at_each, backend, files, decodes))
        if len(pending) >= 4 * (backend.num_readers or _num_threads()):
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _is_quick(files: Sequence[FileState], decodes: bool) -> bool:
    """Whether looking at these files, once they are read, leaves nothing to other threads."""
    is_undecoded = all(file.is_text or (not decodes and file.suffix == ".png") for file in files)
    return is_undecoded and sum(file.size for file in files) <= _SMALL_BYTES * len(files)


def _look_at_each(backend: Backend, files: list[FileState], decodes: bool) -> list[Finding]:
    return [look_at(backend, file, decodes) for file in files]


def look_at(backend: Backend, file: FileState, decodes: bool = True) -> Finding:
    """Read one file and say what it is.

    Args:
        decodes: as in `update_files`.
    """
    if file.size < 0:
        return Finding(file, BROKEN, NOT_READ[file.size])
    suffix = file.suffix
    if suffix in UNREAD_SUFFIXES:
        return Finding(file, BROKEN, UNREAD_SUFFIXES[suffix])
    is_text = suffix in CAPTION_SUFFIXES
    if is_text and file.size > MAX_CAPTION_BYTES:
        return Finding(file, BROKEN, f"larger than {bytes_text(MAX_CAPTION_BYTES)}")
    try:
        data = backend.read(file.path)
    except UnusableFile as error:
        return Finding(file, BROKEN, str(error))
    except OSError as error:
        return Finding(file, UNREADABLE, f"cannot be read: {error.strerror or error}")
    digest = hashlib.sha256(data).digest()
    if is_text:
        try:
            text, note = decode_caption(data)
        except NotText as error:
            return Finding(file, BROKEN, str(error))
        if not text.strip():
            return Finding(file, BROKEN, "holds no text")
        return Finding(file, OK, note, digest, text=text)
    try:
        facts = image_facts(data, decodes)
    except UnusableImage as error:
        return Finding(file, BROKEN, str(error))
    note = " and ".join(filter(None, (facts.note, name_note(file.path))))
    return Finding(file, OK, note or None, digest, facts.height, facts.width, is_decoded=facts.is_decoded)


def _store(database: sqlite3.Connection, key: int | None, findings: Sequence[Finding]) -> None:
    database.executemany("UPDATE files SET live = 0 WHERE live AND path = ?", [(f.file.path,) for f in findings])
    database.executemany(
        "INSERT INTO files (live, folder, path, stem, suffix, is_text, size, mtime_ns, ctime_ns, inode, "
        "status, reason, digest, height, width, text) VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        [_row(key, finding) for finding in findings],
    )
    database.executemany(
        "INSERT INTO undecoded SELECT id FROM files WHERE live AND path = ?",
        [(finding.file.path,) for finding in findings if not finding.is_decoded],
    )


def _row(key: int | None, finding: Finding) -> tuple[object, ...]:
    file = finding.file
    signature = (file.size, file.mtime_ns, file.ctime_ns, file.inode)
    content = (finding.digest, finding.height, finding.width, finding.text)
    return (key, file.path, *file.parts, file.is_text, *signature, finding.status, finding.reason, *content)


def _forget_folders(database: sqlite3.Connection, keys: Sequence[int]) -> None:
    with database:
        database.execute("DELETE FROM catalogue")
        database.executemany("UPDATE files SET live = 0 WHERE live AND folder = ?", [(key,) for key in keys])
        database.executemany("DELETE FROM folders WHERE id = ?", [(key,) for key in keys])


def _num_threads() -> int:
    """Decoding and hashing leave the interpreter's lock; two more than there are cores hide waits for the disk."""
    return min(available_cores() + 2, 32)
