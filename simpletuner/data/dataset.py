"""One dataset of a run: its samples, their buckets, and the reading of pixels and captions.

A dataset keeps a few numbers per image; paths, digests and captions are read from the index when a sample is asked
for, so a million images cost some tens of megabytes.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

from simpletuner.batch import PromptImage, Sample
from simpletuner.config.datasets import EvalDataset, ImageDataset
from simpletuner.data.backends.base import Backend
from simpletuner.data.backends.build import source_key
from simpletuner.data.buckets import BucketRules, BucketSize, plan_crop, training_size
from simpletuner.data.caption_edits import CaptionEdits
from simpletuner.data.caption_table import CaptionTable
from simpletuner.data.captions import CaptionRules, captions_of
from simpletuner.data.index import Index
from simpletuner.data.masks import Masks
from simpletuner.data.prompt_files import PromptFiles, variant
from simpletuner.data.reading import read_pixels
from simpletuner.data.references import References
from simpletuner.data.report import FilterReport
from simpletuner.data.schedule import Schedule
from simpletuner.data.selection import group_by_size
from simpletuner.randomness import keyed_uniform

if TYPE_CHECKING:
    import torch

_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class RoundSampling:
    """What is resampled each time that a dataset is gone through.

    Args:
        crops: random crops and aspects (`vae_cache_clear_each_epoch`).
        flips: which images are mirrored left to right (`random_flip`).
    """

    crops: bool = False
    flips: bool = False


class Samples(Sequence[Sample]):
    """The images of a dataset in the order of their paths; each sample is made when it is asked for.

    Attributes:
        image_index: of the folder.
        ids: (N,) row of each image.
    """

    def __init__(
        self,
        dataset_id: str,
        seed: int,
        index: Index,
        ids: NDArray[np.int64],
        texts: NDArray[np.int64],
        bucket_rules: BucketRules,
        caption_rules: CaptionRules,
        draws: RoundSampling = RoundSampling(),
        edits: CaptionEdits = CaptionEdits(),
        table: CaptionTable | None = None,
        references: tuple[References, ...] = (),
    ):
        self._dataset_id = dataset_id
        self._seed = seed
        self.image_index = index
        self.ids = ids
        self._texts = texts
        self._bucket_rules = bucket_rules
        self._caption_rules = caption_rules
        self._edits = edits
        self._table = table
        self._sizes: tuple[int, Mapping[BucketSize, NDArray[np.int64]]] | None = None
        self._chosen: NDArray[np.bool_] | None = None
        self.draws = draws
        self.references = references

    def __len__(self) -> int:
        return len(self.ids)

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

    def take(self, positions: Sequence[int] | NDArray[np.int64], round_number: int = 0) -> list[Sample]:
        """The samples at `positions`, with one query for all.

        Args:
            round_number: decides what `draws` resamples.
        """
        chosen = np.asarray(positions, dtype=np.int64)
        images = self.image_index.images(self.ids[chosen].tolist())
        texts: list[str | None] = [None] * len(images)
        if self._table is not None:
            texts = self._table.take([image.path for image in images])
        elif self._caption_rules.reads_text_files:
            texts = self.image_index.texts(self._texts[chosen].tolist())
        samples = [
            Sample(
                dataset_id=self._dataset_id,
                path=image.path,
                digest=image.digest,
                width=image.width,
                height=image.height,
                captions=self._edits.apply(captions_of(image.path, text, self._caption_rules)),
                crop=plan_crop(
                    image.height, image.width, self._bucket_rules, *self._crop_key(image.digest, round_number)
                ),
                is_flipped=self._is_flipped(image.digest, round_number),
            )
            for image, text in zip(images, texts, strict=True)
        ]
        if not self.references:
            return samples
        rows = zip(*(each.take(chosen, samples) for each in self.references), strict=True)
        return [dataclasses.replace(sample, references=row) for sample, row in zip(samples, rows, strict=True)]

    def every_version(self) -> Iterator[Sample]:
        """Each sample, and where images are mirrored also its other version: what a cache has to hold."""
        for sample in self:
            yield sample
            if self.draws.flips:
                yield sample.mirrored()

    def buckets_in(self, round_number: int) -> Mapping[BucketSize, NDArray[np.int64]]:
        """(height, width) in pixels -> indices, ascending, where aspects are resampled in each round."""
        if self._sizes is not None and self._sizes[0] == round_number:
            return self._sizes[1]
        sizes = np.empty((len(self), 2), dtype=np.int64)
        for start in range(0, len(self), _CHUNK):
            for offset, row in enumerate(self.image_index.images(self.ids[start : start + _CHUNK].tolist())):
                key = self._crop_key(row.digest, round_number)
                sizes[start + offset] = training_size(row.height, row.width, self._bucket_rules, *key)
        buckets: Mapping[BucketSize, NDArray[np.int64]] = group_by_size(sizes[:, 0], sizes[:, 1])
        if self._chosen is not None:
            buckets = only_chosen(buckets, self._chosen)
        self._sizes = round_number, buckets
        return buckets

    def only(self, chosen: NDArray[np.bool_]) -> Samples:
        """These samples with the same indices, of which `buckets_in` draws the chosen ones alone."""
        copied = copy.copy(self)
        copied._chosen, copied._sizes = chosen, None
        return copied

    def digests(self, positions: Sequence[int]) -> Iterator[str]:
        """The content digest of the images at `positions`, without making samples of them."""
        for start in range(0, len(positions), _CHUNK):
            ids = self.ids[np.asarray(positions[start : start + _CHUNK], dtype=np.int64)].tolist()
            yield from (image.digest for image in self.image_index.images(ids))

    def _crop_key(self, digest: str, round_number: int) -> tuple[int | str, ...]:
        key = (self._seed, self._dataset_id, digest)
        return (*key, "round", round_number) if self.draws.crops else key

    def _is_flipped(self, digest: str, round_number: int) -> bool:
        return self.draws.flips and keyed_uniform(self._seed, self._dataset_id, digest, "flip", round_number) < 0.5


@dataclasses.dataclass(frozen=True)
class Dataset:
    """One entry of the data file, ready to be trained on or evaluated.

    Args:
        entry: as configured, defaults filled in.
        samples: the images that are used.
        buckets: (height, width) in pixels -> indices into `samples`, ascending.
        fingerprint: changes when the content, order, crops or captions of the samples do.
        filter report: what became of the files.
        backend: where the files are.
        masks: where the loss counts; None for all of each image.
        prompt_files: embeddings of the captions, made beforehand; None where they are encoded.
    """

    entry: ImageDataset
    samples: Samples
    buckets: Mapping[BucketSize, NDArray[np.int64]]
    fingerprint: str
    filter_report: FilterReport
    backend: Backend
    masks: Masks | None = None
    prompt_files: PromptFiles | None = None

    @property
    def id(self) -> str:
        return self.entry.id

    @property
    def num_images(self) -> int:
        """Images that take part."""
        return sum(len(members) for members in self.buckets.values())

    def used_digests(self) -> Iterator[tuple[int, str]]:
        """(index into `samples`, content digest) of the images that take part."""
        positions = sorted(int(position) for members in self.buckets.values() for position in members)
        return zip(positions, self.samples.digests(positions), strict=True)

    def only(self, chosen: NDArray[np.bool_]) -> Dataset:
        """The dataset with some of its images; each keeps its index. The fingerprint is the caller's matter.

        Args:
            chosen: (N,) by index into `samples`.
        """
        buckets = only_chosen(self.buckets, chosen)
        return dataclasses.replace(self, samples=self.samples.only(chosen), buckets=buckets)

    @property
    def references(self) -> tuple[References, ...]:
        """The folders with the reference images of these images."""
        return self.samples.references

    @property
    def parts(self) -> tuple[Dataset | References, ...]:
        """The images and the folders of their references: all that the VAE sees."""
        return (self, *self.references)

    @property
    def kind(self) -> Literal["image", "eval"]:
        return "eval" if isinstance(self.entry, EvalDataset) else "image"

    @property
    def repeats(self) -> int:
        """Extra passes over the images in each epoch."""
        return self.entry.repeats

    @property
    def with_replacement(self) -> bool:
        """Whether each image of a batch is a draw of its own."""
        return self.entry.with_replacement

    @property
    def is_regularisation(self) -> bool:
        return self.entry.is_regularisation_data

    @property
    def batch_size(self) -> int | None:
        """Images in one forward pass of one process; None takes that of the run."""
        return self.entry.train_batch_size

    @property
    def schedule(self) -> Schedule:
        entry = self.entry
        ends = (entry.end_epoch or None, entry.end_step or None)
        return Schedule(entry.probability, entry.start_epoch, ends[0], entry.start_step, ends[1])

    @property
    def keeps_latents(self) -> bool:
        """Whether what the VAE says is worth keeping: not where crops are resampled, or nothing may be written."""
        return not (self.entry.vae_cache_disable or self.samples.draws.crops)

    @property
    def encodes_on_demand(self) -> bool:
        """Whether images are encoded when training needs them."""
        return bool(self.entry.vae_cache_ondemand) or not self.keeps_latents

    def samples_to_keep(self) -> Iterator[Sample]:
        """Every version of every sample whose latents are kept."""
        return self.samples.every_version() if self.keeps_latents else iter(())

    @property
    def num_kept(self) -> int:
        """How many `samples_to_keep` gives."""
        return len(self.samples) * (1 + self.samples.draws.flips) if self.keeps_latents else 0

    def buckets_in(self, round_number: int) -> Mapping[BucketSize, NDArray[np.int64]]:
        """(height, width) in pixels -> indices into `samples`, in one round; the same object where nothing is drawn."""
        if self.samples.draws.crops and self.entry.crop_aspect == "random":
            return self.samples.buckets_in(round_number)
        return self.buckets

    def read_pixels(self, sample: Sample) -> torch.Tensor:
        """The cut-out part of an image: (3, H, W) float32 in [-1, 1]. Safe to call from several threads.

        Raises:
            DataError: the file is gone, or is no longer the one that was indexed.
        """
        return read_pixels(self.backend, sample, f"{self.id}.{source_key(self.entry)}")

    def prompt_images(self, rows: Sequence[Sequence[Sample]]) -> list[tuple[PromptImage, ...]]:
        """Rows of references as the encoders of prompts are given them."""
        folders = {each.id: each for each in self.references}
        return [tuple(folders[each.dataset_id].prompt_image(each) for each in row) for row in rows]

    def caption_for(self, sample: Sample, *key: int | str) -> str:
        """One of the caption variants of a sample, drawn by `key` (seed, step, slot)."""
        return sample.captions[variant(len(sample.captions), sample, *key)]


def only_chosen(
    buckets: Mapping[BucketSize, NDArray[np.int64]], chosen: NDArray[np.bool_]
) -> Mapping[BucketSize, NDArray[np.int64]]:
    """The buckets with the chosen indices alone; buckets that lose all of theirs are gone."""
    kept = {size: members[chosen[members]] for size, members in buckets.items()}
    return {size: members for size, members in kept.items() if len(members)}


def dataset_fingerprint(
    content: Sequence[str],
    bucket_rules: BucketRules,
    caption_rules: CaptionRules,
    seed: int,
    draws: RoundSampling = RoundSampling(),
    edits: CaptionEdits = CaptionEdits(),
) -> str:
    """Digest of everything that decides the samples of a dataset; no absolute path is part of it."""
    sizes = dataclasses.asdict(bucket_rules)
    if bucket_rules.enlarges:  # the keys of what came later change no fingerprint from before
        del sizes["enlarges"], sizes["max_side"]
    if not bucket_rules.stretches:
        del sizes["stretches"]
    rules: dict[str, Any] = {
        "content": list(content),
        "buckets": sizes,
        "captions": dataclasses.asdict(caption_rules),
        "seed": seed if bucket_rules.needs_content or draws.flips else None,
        "draws": dataclasses.asdict(draws),
        "edits": _edits_of(edits),
    }
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _edits_of(edits: CaptionEdits) -> dict[str, Any] | None:
    """Edits as a fingerprint has them: what came later is only in it where it is used."""
    if not (edits.filters or edits.shuffle or edits.openers):
        return None
    found = dataclasses.asdict(edits)
    return found if edits.openers else {key: value for key, value in found.items() if key != "openers"}
