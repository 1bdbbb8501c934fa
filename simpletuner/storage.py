"""The one way in which anything becomes a file or folder that counts.

Write into a temporary sibling, fsync, write the manifest with a sha256 of each file last, fsync the folder, rename,
fsync the parent; only then remove what is older. So a kill or a full disk at any instant leaves the previous state or
the new one. A folder counts if and only if its manifest verifies, which also holds where rename is not atomic and
after a copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner.disk import disk_errors, where_supported
from simpletuner.errors import DataError, Problem, bytes_text, error_text
from simpletuner.tempnames import new_sibling, parse_name
from simpletuner.text import printable, read_file, read_json_text, read_tensor_header

if TYPE_CHECKING:
    import torch

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

_CHUNK_BYTES = 8 << 20
_QUICK_CHECK_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 30  # a report of some million skipped images is a quarter of it


def _step(name: str) -> None:
    """Called before each I/O operation that changes the disk: where tests kill the process or fill the disk."""


# ---- single files --------------------------------------------------------------------------------------------------


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace `path` by a file holding `data`: a reader sees the old content or the new, never a part.

    It is on disk when this returns; inside a folder that is being committed, when that is.

    Raises:
        DataError: the disk is full, over quota, read-only or not writable.
    """
    path = Path(path)
    _replace_bytes(path, data, syncs=not _is_synced_later(path))


def _replace_bytes(path: Path, data: bytes, syncs: bool) -> None:
    temporary = new_sibling(path, "tmp")
    with disk_errors(path):
        try:
            _step("create")
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                _write_all(descriptor, data)
                if syncs:
                    _step("fsync")
                    os.fsync(descriptor)
            finally:
                os.close(descriptor)
            _step("rename")
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):  # `clean_stale` removes it later; the first error is the one to tell
                temporary.unlink(missing_ok=True)
            raise
        if syncs:
            _fsync_dir(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Replace `path` by `value` as readable JSON. NaN and infinities are refused, since no other reader takes them."""
    write_bytes(path, _json_bytes(value))


def read_json(path: str | Path, kind: type = object) -> Any:
    """The value in a JSON file, which must be of a kind: `dict`, `list`.

    Raises:
        DataError: the file is missing, unreadable, not JSON or of another kind; names file and line.
    """
    path = Path(path)
    try:
        value = read_json_text(read_file(path, _MAX_JSON_BYTES).decode())
        if not isinstance(value, kind):
            raise ValueError(f"it holds no JSON {'object' if kind is dict else 'list'}")
        return value
    except json.JSONDecodeError as error:
        raise DataError(Problem(f"is not valid JSON: {error.msg}", file=str(path), line=error.lineno)) from error
    except (OSError, ValueError) as error:
        raise DataError(Problem(f"cannot be read: {error}", file=str(path))) from error


def save_tensors(
    path: str | Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Replace `path` by a safetensors file: atomic, on disk when this returns, with the mode that the umask asks for.

    The same tensors and metadata give the same bytes.

    Raises:
        DataError: the disk is full, over quota, read-only or not writable.
    """
    from safetensors.torch import save_file

    # An optimizer that has taken no step yet has no tensors, and safetensors writes a broken header for none of either.
    written = dict(metadata or {}) if metadata or tensors else None
    with replacing_file(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, written)
        _sort_metadata(temporary)


@contextlib.contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """Give a path to write a file to; it replaces `path` when the block ends, and is removed when the block raises.

    For writers that open files themselves. The file is on disk when this returns (inside a folder that is being
    committed, when that is), with the mode that the umask asks for; files that the writer left beside it (a
    `config.json`) go along, before it.

    Raises:
        DataError: the disk is full, over quota, read-only or not writable.
    """
    path = Path(path)
    syncs = not _is_synced_later(path)
    # Such writers may go through temporary files of their own, so they get a folder that `clean_stale` knows.
    temporary = new_sibling(path, "tmp")
    with disk_errors(path):
        try:
            _step("mkdir")
            temporary.mkdir()
            written = temporary / path.name
            _step("write")
            yield written
            mode = temporary.stat().st_mode & 0o666
            for file in sorted(temporary.iterdir(), key=lambda each: each == written):
                with where_supported():
                    file.chmod(mode)
                if syncs:
                    _fsync(file)
                _step("rename")
                file.replace(path.with_name(file.name))
            _step("rmdir")
            temporary.rmdir()
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        if syncs:
            _fsync_dir(path.parent)


def read_tensor_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, whose length must be the one that its header says.

    Raises:
        DataError: the file is missing, cut off, or no safetensors file.
    """
    path = Path(path)
    try:
        header, start = read_tensor_header(path)
        length = path.stat().st_size
        metadata = header.pop("__metadata__", {})
        end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != length:
            raise ValueError(f"it has {bytes_text(length)}, not {bytes_text(end)}")
    except OSError as error:
        raise DataError(Problem(f"cannot be read: {error.strerror}", file=str(path))) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(Problem(f"is not a complete safetensors file: {error}", file=str(path))) from error
    return metadata


def move(path: Path, target: Path) -> None:
    """Give a file or folder another name on the same disk; `target` must be free.

    Raises:
        DataError: the file system is read-only or not writable.
    """
    with disk_errors(target):
        _step("rename")
        path.rename(target)
        _fsync_dir(target.parent)
        _fsync_dir(path.parent)


def file_digest(path: str | Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- folders -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Manifest:
    """What a committed folder holds.

    Args:
        files: path relative to the folder -> (bytes, sha256 in hex).
        metadata: what the writer of the folder noted; JSON.
        version: of this format.
    """

    files: Mapping[str, tuple[int, str]]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        files = {name: {"size": size, "sha256": sha256} for name, (size, sha256) in sorted(self.files.items())}
        body = {"format_version": self.version, "files": files, "metadata": dict(self.metadata)}
        return {**body, "sha256": hashlib.sha256(_json_bytes(body)).hexdigest()}


@contextlib.contextmanager
def commit_dir(final_path: str | Path, metadata: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder to write into; it becomes `final_path` when the block ends without an error.

    If a committed folder of equal content is already there, it stays. A folder of other content is moved aside first
    and removed last; `clean_stale` puts it back if the process dies in between.

    Args:
        metadata: noted in the manifest; read when the block ends, so the block may still fill it in.

    Raises:
        DataError: the disk is full, over quota, read-only or not writable; nothing is left behind.
    """
    final_path = Path(final_path)
    temporary = new_sibling(final_path, "tmp")
    with disk_errors(final_path):
        try:
            _step("mkdir")
            temporary.mkdir(parents=True)
            yield temporary
            manifest = _seal(temporary, metadata or {})
            _publish(temporary, final_path, manifest)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def link_files(source: str | Path, target: str | Path) -> None:
    """Give all files of a committed folder, but its manifest, a second name in the folder `target`.

    Committed files are never changed in place, so both folders keep them. They are copied where the file system knows
    no hard links.
    """
    for path in sorted(Path(source).rglob("*")):
        place = Path(target) / path.relative_to(source)
        if path.is_dir():
            place.mkdir(exist_ok=True)
        elif path != Path(source) / MANIFEST:
            _step("link")
            try:
                os.link(path, place)
            except OSError:
                shutil.copyfile(path, place)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of a committed folder.

    Raises:
        DataError: there is none, it is damaged, or a newer version of this program wrote it.
    """
    file = Path(path) / MANIFEST
    raw = read_json(file)
    if not isinstance(raw, dict) or not isinstance(raw.get("format_version"), int):
        raise DataError(Problem("is not a manifest of this program", file=str(file)))
    if raw["format_version"] > FORMAT_VERSION:
        message, allowed = f"was written in format {raw['format_version']}", f"formats up to {FORMAT_VERSION}"
        raise DataError(Problem(message, file=str(file), allowed=allowed, fix="use a newer version of simpletuner"))
    try:
        files = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in raw["files"].items()}
        if outside := [name for name in files if Path(name).is_absolute() or ".." in Path(name).parts]:
            raise ValueError(f'"{printable(outside[0])}" does not lie in the folder')
        manifest = Manifest(files, raw["metadata"], raw["format_version"])
        digest = manifest.to_json()["sha256"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(Problem(f"is damaged: {error_text(error)}", file=str(file))) from error
    if digest != raw.get("sha256"):
        raise DataError(Problem("is damaged: its own sha256 does not fit", file=str(file)))
    return manifest


def verify_dir(path: str | Path, full: bool = True) -> list[str]:
    """What is wrong with a committed folder, one sentence each; empty if it is whole.

    Files that the manifest does not name are ignored.

    Args:
        full: read and compare every file; else sizes, and the content of files up to 1 MiB.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except DataError as error:
        return [error.render()]
    problems = []
    for name, (size, sha256) in manifest.files.items():
        file = path / name
        try:
            actual = file.stat().st_size
            if not file.is_file():
                problems.append(f"{file} is not a regular file")
            elif actual != size:
                sizes = f"{bytes_text(actual)}, not the {bytes_text(size)}"
                problems.append(f"{file} is damaged: it has {sizes} that were written")
            elif (full or size <= _QUICK_CHECK_BYTES) and file_digest(file) != sha256:
                problems.append(f"{file} is damaged: its sha256 does not fit the manifest")
        except OSError as error:
            problems.append(f"{file} cannot be read: {error.strerror}")
    return problems


def remove_dir(path: str | Path) -> None:
    """Remove a folder so that a kill half-way never leaves a part under its name.

    Raises:
        DataError: the file system is read-only or not writable.
    """
    path = Path(path)
    trash = new_sibling(path, "trash")
    with disk_errors(path):
        _step("rename")
        path.rename(trash)
        _step("rmtree")
        remove = Path.unlink if trash.is_symlink() else shutil.rmtree  # what a link leads to is not ours to delete
        remove(trash)
        _fsync_dir(path.parent)


# ---- sharing a disk ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive_lock(path: str | Path, purpose: str) -> Iterator[None]:
    """Hold a lock file; the kernel frees it when the process dies.

    Args:
        path: the lock file; it stays. `<path>.holder` tells who holds it.
        purpose: what the lock protects, for the message: `training into outputs/run1`.

    Raises:
        DataError: another process holds it; names its pid and host.
    """
    import filelock

    path = Path(path)
    holder = path.with_name(path.name + ".holder")
    lock = filelock.FileLock(path, timeout=0)
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
    except filelock.Timeout:
        raise DataError(_held_by_another(path, holder, purpose)) from None
    except NotImplementedError as error:
        problem = Problem("its file system knows no locks", file=str(path), fix="choose a folder on another disk")
        raise DataError(problem) from error
    try:
        with contextlib.suppress(DataError):  # it only names the holder in a message: a full disk may still be freed
            write_json(holder, {"pid": os.getpid(), "host": socket.gethostname(), "purpose": purpose})
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink(missing_ok=True)
        lock.release()


def require_free_space(path: str | Path, num_bytes: int, what: str) -> None:
    """Check before writing that the disk of `path` (which need not exist yet) has room.

    Args:
        what: what needs the room, for the message: `the VAE cache`.

    Raises:
        DataError: it has not; names needed and free bytes.
    """
    existing = Path(path).absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise DataError(
            Problem(
                f"{what} needs {bytes_text(num_bytes)}, and only {bytes_text(free)} are free",
                file=str(path),
                fix="free some space or choose a folder on another disk",
            )
        )


# ---- the steps of the protocol -------------------------------------------------------------------------------------


def _seal(folder: Path, metadata: Mapping[str, Any]) -> Manifest:
    """Bring all files of a folder to the disk, then write its manifest as the last one."""
    files = {}
    folders = []
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            folders.append(path)
            continue
        _fsync(path)
        files[path.relative_to(folder).as_posix()] = (path.stat().st_size, file_digest(path))
    manifest = Manifest(files, json.loads(_json_bytes(dict(metadata))))
    for each in reversed(folders):
        _fsync_dir(each)
    _replace_bytes(folder / MANIFEST, _json_bytes(manifest.to_json()), syncs=True)
    return manifest


def _publish(temporary: Path, final_path: Path, manifest: Manifest) -> None:
    """Give a sealed folder its name."""
    aside = None
    if final_path.exists():
        if not verify_dir(final_path) and read_manifest(final_path) == manifest:
            shutil.rmtree(temporary)
            return
        aside = new_sibling(final_path, "aside")
        _step("rename")
        final_path.rename(aside)
    try:
        _step("rename")
        temporary.rename(final_path)
    except OSError:
        if aside is not None:
            with contextlib.suppress(OSError):  # `clean_stale` puts it back later
                aside.rename(final_path)
        raise
    _fsync_dir(final_path.parent)
    if aside is not None:
        _step("rmtree")
        shutil.rmtree(aside, ignore_errors=True)  # the new folder counts already; `clean_stale` removes the rest


def _is_synced_later(path: Path) -> bool:
    """Whether `path` is in a temporary folder: all its files are brought to the disk before it gets its name."""
    return any(parse_name(part) for part in path.parent.parts)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        _step("write")
        view = view[os.write(descriptor, view[:_CHUNK_BYTES]) :]


def _fsync_dir(path: Path) -> None:
    with where_supported():
        _fsync(path, "fsync folder")


def _fsync(path: Path, step: str = "fsync") -> None:
    _step(step)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata in a safetensors header in place: safetensors writes it in a random order."""
    header, start = read_tensor_header(path)
    if "__metadata__" in header:
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= start - 8:
            with path.open("r+b") as file:
                file.seek(8)
                file.write(text.ljust(start - 8))


def _json_bytes(value: Any) -> bytes:
    # A path need not be text: what of it is none is escaped, and read back as it was.
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")


def _held_by_another(path: Path, holder: Path, purpose: str) -> Problem:
    who = "another process"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        info = read_json_text(holder.read_text())
        who = f"process {info['pid']} on {info['host']} ({info['purpose']})"
    return Problem(
        f"{purpose}: {who} already does this",
        file=str(path),
        fix="wait until it has ended, or stop it; the lock is freed when that process ends",
    )
