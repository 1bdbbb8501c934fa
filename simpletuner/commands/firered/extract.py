"""`simpletuner extract-vlm-embeds`: what a vision-language model says of each row, as files, made once.

Each process takes the lines whose number it has modulo the number of processes, and needs to hear nothing of the
others. A file is written whole or not at all, and noted with a digest of all that decides what is in it: text, images,
model, sizes. So a command that was killed continues where it was, and one whose inputs have changed makes again what
they changed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from simpletuner import storage
from simpletuner.batch import PromptImage, PromptRequest
from simpletuner.cache.fingerprints import prompt_fingerprint
from simpletuner.cache.prompts import encode
from simpletuner.commands.firered.extract_flags import ExtractFlags
from simpletuner.commands.firered.extract_rows import DROPPED, Line, Variant, rows_of, variants_of, written_row
from simpletuner.commands.firered.fetch import FetchError, fetch, is_url
from simpletuner.commands.firered.keys import ALIGNMENT
from simpletuner.commands.text import Say
from simpletuner.data.digests import DigestMemo
from simpletuner.data.reading import to_image
from simpletuner.data.references import ReferenceRules, plan_reference
from simpletuner.data.transforms import UnusableImage, image_size, load_image, to_pixels
from simpletuner.errors import DataError, Problem
from simpletuner.text import read_json_text

if TYPE_CHECKING:
    from torch import Tensor

    from simpletuner.models.family import ModelFamily

# Of the embeddings of a text without images in front of which nothing else differs: one file for all rows.
NULL_FILE = "null_text_embedding"
_REPORT_SECONDS = 30.0
# Raise it when the same row would be encoded in another way.
_VERSION = 1


@dataclass(frozen=True)
class Place:
    """Where one process of several writes.

    Args:
        folder: of the embeddings.
        rows: its table.
        rank: of the process.
        size: processes.
    """

    folder: Path
    rows: Path
    rank: int
    size: int


def place_of(flags: ExtractFlags, rank: int, size: int) -> Place:
    stem = flags.jsonl_path.stem
    rows = flags.output_jsonl_dir / f"{stem}_rank_{rank:03}.jsonl"
    return Place((flags.embeddings_save_dir / stem).absolute(), rows.absolute(), rank, size)


def extract(
    flags: ExtractFlags,
    working_dir: Path,
    rank: int,
    size: int,
    load_family: Callable[[], ModelFamily],
    say: Say,
) -> Path:
    """Encode the rows of one process; returns its table of rows.

    Args:
        load_family: called once, after the rows have been read.

    Raises:
        ConfigError: rows that cannot be used.
        DataError: images or the model cannot be read, or the disk is full.
    """
    notes: list[str] = []
    rows = rows_of(flags, working_dir, rank, size, notes)
    place = place_of(flags, rank, size)
    for note in notes:
        say(f"warning: {note}")
    place.folder.mkdir(parents=True, exist_ok=True)
    written: list[dict[str, Any]] = []
    if rows:
        with DigestMemo(place.folder / "digests.sqlite") as memo, ThreadPoolExecutor(flags.num_workers) as readers:
            written = _Extraction(flags, place, load_family(), memo, readers, say).run(rows)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in written)
    place.rows.parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(place.rows, text.encode())
    return place.rows


class _Extraction:
    def __init__(
        self,
        flags: ExtractFlags,
        place: Place,
        family: ModelFamily,
        memo: DigestMemo,
        readers: ThreadPoolExecutor,
        say: Say,
    ):
        self.flags, self.place, self.family, self.memo, self.readers, self.say = (
            flags,
            place,
            family,
            memo,
            readers,
            say,
        )
        self.rules = ReferenceRules(False, flags.image_sample_size, "pixel_area", ALIGNMENT)
        settings = [_VERSION, prompt_fingerprint(family, memo), flags.image_sample_size]
        self.settings = hashlib.sha256(repr(settings).encode()).hexdigest()
        self.journal = Journal(place)
        self.num_made = self.num_there = self.num_bad = 0

    def run(self, rows: Sequence[Line]) -> list[dict[str, Any]]:
        written: list[dict[str, Any]] = []
        said = time.monotonic()
        for start in range(0, len(rows), self.flags.batch_size):
            for row in self._usable(rows[start : start + self.flags.batch_size]):
                written.append(self._encode_row(*row))
            if time.monotonic() - said > _REPORT_SECONDS:
                said = time.monotonic()
                self.say(f"process {self.place.rank}: {start + self.flags.batch_size} of {len(rows)} rows")
        bad = f", {self.num_bad} rows left out" if self.num_bad else ""
        self.say(f"process {self.place.rank}: {self.num_made} files made, {self.num_there} were there{bad}")
        if not written:
            raise DataError(Problem("no row could be used", file=str(self.flags.jsonl_path)))
        return written

    def _usable(self, rows: Sequence[Line]) -> Iterator[tuple[Line, dict[str, Path], dict[str, tuple[int, int]]]]:
        """Rows with their images fetched and measured."""
        names = list(dict.fromkeys(name for row in rows for name in (*row.sources, row.target)))
        looked_at = dict(zip(names, self.readers.map(self._look_at, names), strict=True))
        for row in rows:
            own = {name: looked_at[name] for name in (*row.sources, row.target)}
            faults = [found for found in own.values() if isinstance(found, str)]
            if not faults:
                found = {name: each for name, each in own.items() if not isinstance(each, str)}
                paths = {name: path for name, (path, _) in found.items()}
                yield row, paths, {name: size for name, (_, size) in found.items()}
                continue
            problem = Problem(faults[0], file=str(self.flags.jsonl_path), line=row.number + 1)
            if not self.flags.skip_bad_rows:
                raise DataError([problem, Problem("a row cannot be used", fix="correct it, or add --skip_bad_rows")])
            self.num_bad += 1
            self.say(f"warning: left out: {problem.render()}")

    def _look_at(self, name: str) -> tuple[Path, tuple[int, int]] | str:
        """The local file of an image and its (height, width), or what is wrong with it."""
        try:
            path = self._fetched(name) if is_url(name) else Path(name)
            return path, image_size(path.read_bytes())
        except (OSError, UnusableImage, FetchError) as error:
            return f"{name} cannot be used: {error}"

    def _fetched(self, url: str) -> Path:
        suffix = Path(url.partition("?")[0]).suffix.lower()
        name = hashlib.sha256(url.encode()).hexdigest()[:32] + (suffix if suffix.isascii() and len(suffix) < 6 else "")
        path = self.place.folder / "images" / name
        if not path.is_file():
            fetch(url, path)
        return path

    def _encode_row(
        self, row: Line, images: Mapping[str, Path], sizes: Mapping[str, tuple[int, int]]
    ) -> dict[str, Any]:
        variants = variants_of(row, self.flags)
        files = {each.name: self._file(row, each) for each in variants}
        keys = {each.name: self._key(each, images) for each in variants}
        encoded: dict[tuple[str, tuple[str, ...]], Tensor] = {}
        for each in variants:
            if self.journal.has(files[each.name], keys[each.name]):
                self.num_there += 1
                continue
            if each.request not in encoded:  # a missing instruction is the dropped one
                encoded[each.request] = self._encode(each, images)
            self._write(files[each.name], encoded[each.request])
            self.journal.note(files[each.name], keys[each.name])
            self.num_made += 1
        return written_row(row, images, sizes, files)

    def _file(self, row: Line, variant: Variant) -> Path:
        is_null = self.flags.t2i_mode and variant.name == DROPPED
        stem = NULL_FILE if is_null else f"{row.number}_{variant.name}"
        return self.place.folder / f"{stem}.{self.flags.file_format}"

    def _key(self, variant: Variant, images: Mapping[str, Path]) -> str:
        digests = [self.memo.digest(images[name]) for name in variant.images]
        return hashlib.sha256(json.dumps([self.settings, variant.text, digests]).encode()).hexdigest()

    def _encode(self, variant: Variant, images: Mapping[str, Path]) -> Tensor:
        """(L, D) on the CPU: an instruction behind its images, encoded by itself."""
        shown = tuple(self.readers.map(self._shown, (images[name] for name in variant.images)))
        [(_, embeds)] = encode(self.family, [PromptRequest(variant.text, shown)])
        [tensor] = embeds.tensors.values()
        return tensor

    def _shown(self, path: Path) -> PromptImage:
        """An image as training cuts it for the VAE, and shows it to the encoder."""
        image = load_image(path.read_bytes())
        return PromptImage.of(to_image(to_pixels(image, plan_reference(image.height, image.width, self.rules))))

    def _write(self, file: Path, embeds: Tensor) -> None:
        [name] = self.family.spec.prompt_tensors
        if self.flags.file_format == "safetensors":
            storage.save_tensors(file, {name: embeds}, {"format": "pt"})
            return
        import torch

        with storage.replacing_file(file) as temporary:
            torch.save(embeds.contiguous(), temporary)  # one tensor, as the original reads it


class Journal:
    """Which files are whole, and what they are made of: a line for each, written after the file.

    Every process has a journal of its own, and reads those of all: another number of processes makes nothing twice.
    """

    def __init__(self, place: Place):
        entries: list[tuple[int, str, str]] = []
        for path in place.folder.glob("made_rank_*.log"):
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    when, name, key = read_json_text(line)
                except ValueError:  # what a process that was killed wrote last
                    continue
                entries.append((when, name, key))
        self._known = {name: key for _, name, key in sorted(entries)}
        self._path = place.folder / f"made_rank_{place.rank:03}.log"

    def has(self, file: Path, key: str) -> bool:
        """Whether a file is there and made of this."""
        return self._known.get(file.name) == key and file.is_file()

    def note(self, file: Path, key: str) -> None:
        """Say that a file is whole."""
        self._known[file.name] = key
        with self._path.open("a", encoding="utf-8") as journal:
            # The line ends in front: a line that a kill has cut short does not spoil the next one.
            journal.write("\n" + json.dumps([time.time_ns(), file.name, key]))
