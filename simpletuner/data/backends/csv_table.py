"""Images on disk that a CSV file names, with captions from the same rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from simpletuner.data.backends.base import FileStat, Folder, UnusableFile, content_number, join, listing_digest
from simpletuner.data.backends.containment import is_url, path_inside
from simpletuner.data.backends.local import CAPTION_SUFFIX, LocalBackend
from simpletuner.data.tables import TableFault, columns_of, joined, read_rows
from simpletuner.errors import DataError, Problem


class CsvBackend:
    """See `Backend`. The table is read once, when this is made.

    Args:
        table: the CSV file (tab-separated where it ends with .tsv), UTF-8, with a header.
        root: folder that paths start from and may not leave.
        caption_column: None where no caption is asked for.
        dataset_id: named in errors, with the key.
        file: data file that errors name.
        follows_outside: as in `LocalBackend`.

    Raises:
        DataError: the table cannot be read, lacks a column, or names URLs.
    """

    def __init__(
        self,
        table: Path,
        root: Path,
        path_column: str,
        caption_column: str | None,
        dataset_id: str,
        file: str | None = None,
        follows_outside: bool = False,
    ):
        self.location = str(root)
        self.num_readers = None
        self._table, self._dataset_id, self._file = table, dataset_id, file
        self._root = root
        self._disk = LocalBackend(root, follows_outside)
        self.identity = f"{table.resolve()} {self._disk.identity} {path_column} {caption_column}"
        self._captions: dict[bytes, bytes] = {}
        self._refused: dict[bytes, str] = {}
        self._folders: dict[bytes, list[bytes]] = defaultdict(list)
        self._read_table(path_column, caption_column)

    def folders(self) -> Iterator[Folder]:
        for folder in sorted(self._folders):
            yield Folder(folder, listing_digest(self.files(folder)))

    def files(self, folder: bytes) -> Iterator[FileStat]:
        for name in self._folders.get(folder, ()):
            path = join(folder, name)
            caption = self._captions.get(path + CAPTION_SUFFIX.encode())
            if path in self._refused:
                yield FileStat(name, 0, 0, 0, content_number(self._refused[path].encode()))
            else:
                yield FileStat(name, *self._disk.numbers(path))
            if caption is not None:
                yield FileStat(name + CAPTION_SUFFIX.encode(), len(caption), 0, 0, content_number(caption))

    def read(self, path: bytes) -> bytes:
        if path in self._captions:
            return self._captions[path]
        if path in self._refused:
            raise UnusableFile(self._refused[path])
        return self._disk.read(path)

    def _read_table(self, path_column: str, caption_column: str | None) -> None:
        captions: dict[bytes, dict[str, None]] = {}
        try:
            header = columns_of(self._table)
            for key, column in (("filename_column", path_column), ("csv_caption_column", caption_column)):
                if column is not None and column not in header:
                    raise self._fault(key, f'there is no column "{column}"', header)
            columns = [caption_column] if caption_column else []
            for row in read_rows(self._table, {path_column, *columns}):
                path = self._place(row.name(path_column), row.place)
                captions.setdefault(path, {}).update(dict.fromkeys(row.captions(columns)))
        except (OSError, TableFault) as error:
            raise self._fault("csv_file", f"cannot be read: {error}") from error
        for path, variants in captions.items():
            folder, _, name = path.rpartition(b"/") if path not in self._refused else (b"", b"", path)
            self._folders[folder].append(name)
            if variants:
                self._captions[path + CAPTION_SUFFIX.encode()] = joined(list(variants)).encode()

    def _place(self, name: str, place: str) -> bytes:
        """A row's image relative to the root; kept as it is written where it may not be read."""
        if is_url(name):
            message = f"{place} names a URL; images are not downloaded"
            raise self._fault("csv_file", message, fix="fetch the images, and write their paths into the table")
        try:
            path = path_inside(self._root, name)
            if path.lower().endswith(CAPTION_SUFFIX.encode()):
                raise UnusableFile("is a text file, not an image")
        except UnusableFile as error:
            path = name.encode() or b"(empty)"
            self._refused[path] = str(error)
        return path

    def _fault(self, key: str, message: str, columns: Sequence[str] | None = None, fix: str | None = None) -> DataError:
        allowed = f"one of its columns: {', '.join(columns)}" if columns is not None else None
        message = f"{self._table}: {message}"
        return DataError(Problem(message, key=f"{self._dataset_id}.{key}", file=self._file, allowed=allowed, fix=fix))
