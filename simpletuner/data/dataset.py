"""One dataset of a run: its samples, their buckets, and the reading of pixels and captions.

A dataset keeps a few numbers per picture; paths, digests and captions are read from the index when a sample is asked
for, so a million pictures cost some tens of megabytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from simpletuner.batch import Sample
from simpletuner.config.datasets import EvalDataset, ImageDataset
from simpletuner.data.backends.base import Backend
from simpletuner.data.buckets import BucketRules, plan_crop
from simpletuner.data.captions import CaptionRules, captions_of, printable
from simpletuner.data.index import Index
from simpletuner.data.report import Funnel
from simpletuner.data.transforms import UnusablePicture, load_picture, to_pixels
from simpletuner.errors import DataError, Problem
from simpletuner.randomness import keyed_seed

if TYPE_CHECKING:
    import torch

Size = tuple[int, int]

_CHUNK = 512


class Samples(Sequence[Sample]):
    """The pictures of a dataset in the order of their paths; each sample is made when it is asked for."""

    def __init__(
        self,
        dataset_id: str,
        seed: int,
        index: Index,
        ids: NDArray[np.int64],
        texts: NDArray[np.int64],
        bucket_rules: BucketRules,
        caption_rules: CaptionRules,
    ):
        self._dataset_id = dataset_id
        self._seed = seed
        self._index = index
        self._ids = ids
        self._texts = texts
        self._bucket_rules = bucket_rules
        self._caption_rules = caption_rules

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, item: int) -> Sample: ...
    @overload
    def __getitem__(self, item: slice) -> list[Sample]: ...
    def __getitem__(self, item: int | slice) -> Sample | list[Sample]:
        if isinstance(item, slice):
            return self.take(range(*item.indices(len(self))))
        if not -len(self) <= item < len(self):
            raise IndexError(f"sample {item} of {len(self)}")
        return self.take([item])[0]

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), _CHUNK):
            yield from self.take(range(start, min(start + _CHUNK, len(self))))

    def take(self, positions: Sequence[int]) -> list[Sample]:
        """The samples at `positions`, with one query for all."""
        chosen = np.asarray(positions, dtype=np.int64)
        pictures = self._index.pictures(self._ids[chosen].tolist())
        texts: list[str | None] = [None] * len(pictures)
        if self._caption_rules.reads_text_files:
            texts = self._index.texts(self._texts[chosen].tolist())
        key = (self._seed, self._dataset_id)
        return [
            Sample(
                dataset_id=self._dataset_id,
                path=picture.path,
                digest=picture.digest,
                width=picture.width,
                height=picture.height,
                captions=captions_of(picture.path, text, self._caption_rules),
                crop=plan_crop(picture.height, picture.width, self._bucket_rules, *key, picture.digest),
            )
            for picture, text in zip(pictures, texts, strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One entry of the data file, ready to be trained on or evaluated.

    Args:
        entry: as configured, defaults filled in.
        samples: the pictures that are used.
        buckets: (height, width) in pixels -> indices into `samples`, ascending.
        fingerprint: changes when the content, order, crops or captions of the samples do.
        funnel: what became of the files.
        backend: where the files are.
    """

    entry: ImageDataset
    samples: Samples
    buckets: Mapping[Size, NDArray[np.int64]]
    fingerprint: str
    funnel: Funnel
    backend: Backend

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def kind(self) -> Literal["image", "eval"]:
        return "eval" if isinstance(self.entry, EvalDataset) else "image"

    @property
    def repeats(self) -> int:
        """Extra passes over the pictures in each epoch."""
        return self.entry.repeats

    @property
    def is_regularisation(self) -> bool:
        return self.entry.is_regularisation_data

    def read_pixels(self, sample: Sample) -> torch.Tensor:
        """The cut-out part of a picture: (3, H, W) float32 in [-1, 1]. Safe to call from several threads.

        Raises:
            DataError: the file is gone, or is no longer the one that was indexed: what is made of it would be kept
                under the name of the old content.
        """
        try:
            data = self.backend.read(os.fsencode(sample.path))
        except OSError as error:
            raise self._unreadable(sample, f"cannot be read: {error.strerror or error}") from error
        if hashlib.sha256(data).hexdigest() != sample.digest:
            raise self._unreadable(sample, "changed since the run began")
        try:
            return to_pixels(load_picture(data), sample.crop)
        except UnusablePicture as error:
            raise self._unreadable(sample, str(error)) from error

    def caption_for(self, sample: Sample, *key: int | str) -> str:
        """One of the caption variants of a sample, drawn by `key` (seed, step, slot)."""
        if len(sample.captions) == 1:
            return sample.captions[0]
        return sample.captions[keyed_seed(*key, "caption", sample.digest) % len(sample.captions)]

    def _unreadable(self, sample: Sample, what: str) -> DataError:
        path = Path(self.backend.location) / sample.path
        return DataError(
            Problem(
                f"the picture {printable(str(path))} {what}",
                key=f"{self.id}.instance_data_dir",
                fix="start the run again: the folder is looked at anew, and training goes on from the last checkpoint",
            )
        )


def dataset_fingerprint(
    content: Sequence[str], bucket_rules: BucketRules, caption_rules: CaptionRules, seed: int
) -> str:
    """Digest of everything that decides the samples of a dataset; no absolute path is part of it."""
    rules: dict[str, Any] = {
        "content": list(content),
        "buckets": dataclasses.asdict(bucket_rules),
        "captions": dataclasses.asdict(caption_rules),
        "seed": seed if bucket_rules.needs_content else None,
    }
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()
