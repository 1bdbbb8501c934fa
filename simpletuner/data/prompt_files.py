"""Embeddings of captions that were made beforehand: safetensors files which a table beside the images names.

With them no text encoder reads the captions of a dataset, so what a large vision-language model says of an instruction
and its images is worked out once, by `simpletuner extract-vlm-embeds` or another program.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from simpletuner.batch import PromptEmbeds, Sample
from simpletuner.data.captions import VARIANT_SEPARATOR
from simpletuner.errors import DataError, Problem
from simpletuner.randomness import keyed_seed

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
_CHUNK, _LISTED = 512, 10


class NamedFiles(Protocol):
    """Which files belong to an image: a table beside the images, or rows of records."""

    @property
    def table(self) -> Path:
        """The file that names them; relative names lead from its folder."""
        ...

    @property
    def digest(self) -> str:
        """Changes when other files are named."""
        ...

    def take(self, paths: Sequence[str]) -> list[str | None]:
        """The files of each image in one text, apart by U+001E; None where none are named."""
        ...


@dataclass(frozen=True)
class PromptFileRow:
    """The files of one image.

    Args:
        files: one for each caption variant, in their order.
        dropped: stands for the dropped caption; None where the family's own is encoded.
    """

    files: tuple[Path, ...]
    dropped: Path | None


class PromptFiles:
    """The embedding files of one dataset. Safe to use from several threads.

    Args:
        table: names the files of each image, relative to its own folder or absolute.
        dropped: names the file for the dropped caption of each image.
        names: of the tensors that the family has for a prompt.
        key: names the dataset in errors.
    """

    def __init__(self, table: NamedFiles, dropped: NamedFiles | None, names: Sequence[str], key: str):
        self._table, self._dropped, self._names, self._key = table, dropped, tuple(names), key

    @property
    def has_dropped(self) -> bool:
        """Whether dropped captions have files too."""
        return self._dropped is not None

    @property
    def fingerprint(self) -> list[str]:
        """Changes when other files are named."""
        return [self._table.digest, *([self._dropped.digest] if self._dropped else [])]

    def take(self, samples: Sequence[Sample]) -> list[PromptFileRow]:
        """The files of each sample.

        Raises:
            DataError: a sample has not as many files as captions.
        """
        paths = [sample.path for sample in samples]
        dropped = self._dropped.take(paths) if self._dropped else [None] * len(samples)
        rows = []
        for sample, named, instead in zip(samples, self._table.take(paths), dropped, strict=True):
            files = tuple(self._path(name) for name in named.split(VARIANT_SEPARATOR)) if named else ()
            if len(files) != len(sample.captions):
                message = f"{sample.path} has {len(sample.captions)} captions and {len(files)} files of embeddings"
                raise DataError(Problem(message, f"{self._key}.prompt_embeds_column", str(self._table.table)))
            rows.append(PromptFileRow(files, self._path(instead) if instead else None))
        return rows

    def require_files(self, samples: Sequence[Sample]) -> None:
        """Look for every file before anything is loaded for it.

        Raises:
            DataError: lists the first that are missing, or are no safetensors files.
        """
        missing: list[Path] = []
        pickles: list[Path] = []
        for start in range(0, len(samples), _CHUNK):
            for row in self.take(samples[start : start + _CHUNK]):
                for file in (*row.files, *([row.dropped] if row.dropped else [])):
                    if file.suffix != SUFFIX:
                        pickles.append(file)
                    elif not file.is_file():
                        missing.append(file)
        key, table = f"{self._key}.prompt_embeds_column", str(self._table.table)
        problems = []
        if missing:
            message = f"{len(missing)} files of embeddings are not there: {_shown(missing)}"
            problems.append(Problem(message, key, table, fix="make them again, or correct the table"))
        if pickles:
            message = f"{len(pickles)} files of embeddings are no {SUFFIX} files: {_shown(pickles)}"
            fix = f"turn them into {SUFFIX}: simpletuner convert {pickles[0].parent}; then name those in the table"
            problems.append(Problem(message, key, table, fix=fix))
        if problems:
            raise DataError(problems)

    def embeds(self, row: PromptFileRow, sample: Sample, *key: int | str) -> PromptEmbeds:
        """The embeddings of one caption variant: of the one that `Dataset.caption_for` gives for the same key.

        Raises:
            DataError: the file cannot be used.
        """
        return self.read(row.files[variant(len(row.files), sample, *key)])

    def read(self, file: Path) -> PromptEmbeds:
        """What a file holds.

        Raises:
            DataError: it cannot be read, or does not hold what the family has for a prompt.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors: Mapping[str, Tensor] = load_file(file)
        except (OSError, SafetensorError) as error:
            raise self._unusable(file, f"cannot be read: {error}") from error
        if len(tensors) == len(self._names) == 1:  # one tensor needs no name: other programs have their own
            tensors = dict(zip(self._names, tensors.values(), strict=True))
        if tensors.keys() != set(self._names):
            held = ", ".join(sorted(tensors)) or "nothing"
            raise self._unusable(file, f"holds {held}", f"tensors with the names {', '.join(self._names)}")
        for name, tensor in tensors.items():
            if not tensor.is_floating_point() or tensor.ndim not in (1, 2):
                shape = " x ".join(map(str, tensor.shape)) or "single number"
                raise self._unusable(file, f"{name} is a {shape} tensor of {tensor.dtype}", "tokens x features, floats")
            if not tensor.isfinite().all():
                raise self._unusable(file, f"{name} is not finite")
        return PromptEmbeds(tensors)

    def _path(self, name: str) -> Path:
        return self._table.table.parent / name

    def _unusable(self, file: Path, message: str, allowed: str | None = None) -> DataError:
        fix = "make the file again"
        return DataError(Problem(message, f"{self._key}.prompt_embeds_column", str(file), allowed=allowed, fix=fix))


def variant(count: int, sample: Sample, *key: int | str) -> int:
    """Which of `count` caption variants of a sample is used, drawn by `key` (seed, step, slot)."""
    return 0 if count == 1 else keyed_seed(*key, "caption", sample.digest) % count


def _shown(files: Sequence[Path]) -> str:
    more = ", ..." if len(files) > _LISTED else ""
    return ", ".join(str(file) for file in files[:_LISTED]) + more
