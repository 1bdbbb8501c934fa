"""Images through a VAE, in batches of one fixed size, while the next ones are read.

A VAE's results differ in the last bits with the size of the batch. So every batch has the same size, short ones are
filled up, and an image encoded again, alone or in other company, gives the same bits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from simpletuner.batch import Sample
from simpletuner.data.transforms import UnusableImage
from simpletuner.errors import DataError, Problem
from simpletuner.hardware import available_cores
from simpletuner.models.family import LatentMoments, ModelFamily

UNREADABLE = (UnusableImage, DataError, OSError)
CPU_READERS, MOST_READERS = 2, 16
# Small images are read several in a task: handing over each takes the encoding thread a fiftieth of a small VAE's time.
TASK_PIXELS = 512 * 256
NOT_FINITE = "the VAE gives NaN or infinite latents for it"


def num_readers(device: torch.device, num_processes: int = 1) -> int:
    """Threads that decode images while a VAE on `device` encodes.

    On the CPU the VAE wants the cores itself. An accelerator encodes a photograph sooner than a core has decoded it.
    """
    if device.type == "cpu":
        return CPU_READERS
    return min(max(available_cores() // num_processes, CPU_READERS), MOST_READERS)


class ManySamples(Protocol):
    """Samples that are counted and gone through, any number of times."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...


class ImageSource(Protocol):
    """What is needed of a dataset."""

    @property
    def samples(self) -> ManySamples: ...

    def read_pixels(self, sample: Sample) -> Tensor:
        """(3, H, W) float32 in [-1, 1]; called from several threads."""
        ...


@dataclass(frozen=True)
class DecodedSample:
    """A sample with its pixels (3, H, W), or with the reason why there are none."""

    sample: Sample
    pixels: Tensor | None
    reason: str = ""


class BatchEncoder:
    """A loaded VAE that always sees `batch_size` images."""

    def __init__(self, family: ModelFamily, vae: nn.Module, batch_size: int):
        self.family = family
        self.vae = vae
        self.batch_size = batch_size

    def encode(self, images: Sequence[Tensor]) -> list[LatentMoments | None]:
        """Encode up to `batch_size` images (3, H, W) of one size; None where the VAE gives NaN or infinities.

        Raises:
            DataError: the device has not enough memory.
        """
        filled = [*images, *[images[-1]] * (self.batch_size - len(images))]
        pixel_values = filled[0][None] if len(filled) == 1 else torch.stack(filled)  # (B, 3, H, W)
        try:
            moments = self._encode_again_if_infinite(pixel_values, len(images))
        except torch.OutOfMemoryError as error:
            height, width = pixel_values.shape[-2:]
            raise DataError(
                Problem(
                    f"not enough memory on {self.vae.device} to encode {self.batch_size} images of {width}x{height}",
                    key="vae_batch_size",
                    fix="lower vae_batch_size",
                )
            ) from error
        return [each if _is_finite(each) else None for each in moments]

    def _encode_again_if_infinite(self, pixel_values: Tensor, num_images: int) -> list[LatentMoments]:
        """Half precision overflows in some VAEs; float32 is tried once before an image is given up."""
        moments = self.family.encode_images(self.vae, pixel_values)[:num_images]
        dtype = next(self.vae.parameters()).dtype
        if dtype == torch.float32 or all(map(_is_finite, moments)):
            return moments
        try:
            exact = self.family.encode_images(self.vae.to(torch.float32), pixel_values)
        finally:
            self.vae.to(dtype)
        return [first if _is_finite(first) else again for first, again in zip(moments, exact, strict=False)]


def in_tasks(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    """Samples that follow each other, so many together that one task has about `TASK_PIXELS` to read."""
    task: list[Sample] = []
    num_pixels = 0
    for sample in samples:
        task.append(sample)
        num_pixels += sample.crop.height * sample.crop.width
        if num_pixels >= TASK_PIXELS:
            yield task
            task, num_pixels = [], 0
    if task:
        yield task


def read_ahead(
    tasks: Iterable[Sequence[Sample]],
    read_pixels: Callable[[Sample], Tensor],
    pool: Executor,
    num_threads: int,
    num_ahead: int,
) -> Iterator[DecodedSample]:
    """Images in the order of the samples, read in `pool`.

    Args:
        num_threads: of the pool; each has a task.
        num_ahead: images that wait, at most; more where the tasks of the threads alone have more.
    """
    waiting: deque[tuple[int, Future[list[DecodedSample]]]] = deque()
    num_waiting = 0
    for task in tasks:
        waiting.append((len(task), pool.submit(_read_task, task, read_pixels)))
        num_waiting += len(task)
        while len(waiting) > num_threads and num_waiting > num_ahead:
            num_read, read = waiting.popleft()
            num_waiting -= num_read
            yield from read.result()
    for _, read in waiting:
        yield from read.result()


def _read_task(task: Sequence[Sample], read_pixels: Callable[[Sample], Tensor]) -> list[DecodedSample]:
    return [read_sample(sample, read_pixels) for sample in task]


def read_sample(sample: Sample, read_pixels: Callable[[Sample], Tensor]) -> DecodedSample:
    """Read one image; what cannot be read is reported, not raised."""
    try:
        return DecodedSample(sample, read_pixels(sample))
    except UNREADABLE as error:
        # Of an image that cannot be decoded the reason that a scan gives, without the path and what to do.
        return DecodedSample(
            sample, None, str(error.__cause__ if isinstance(error.__cause__, UnusableImage) else error)
        )


def batches_of_one_size(images: Iterable[DecodedSample], batch_size: int) -> Iterator[list[DecodedSample]]:
    """Group readable images that follow each other and have one size; an unreadable one comes alone."""
    batch: list[DecodedSample] = []
    shape = None
    for image in images:
        if image.pixels is None:
            yield [image]
            continue
        if batch and (len(batch) == batch_size or shape != image.pixels.shape):
            yield batch
            batch = []
        batch.append(image)
        shape = image.pixels.shape
    if batch:
        yield batch


def encode_batch(
    encoder: BatchEncoder, batch: Sequence[DecodedSample]
) -> Iterator[tuple[DecodedSample, LatentMoments | str]]:
    """Each image of a batch of `batches_of_one_size` with its moments, or with the reason why there are none."""
    pixels = [image.pixels for image in batch if image.pixels is not None]
    results = iter(encoder.encode(pixels) if pixels else [])
    for image in batch:
        yield image, image.reason if image.pixels is None else next(results) or NOT_FINITE


def _is_finite(moments: LatentMoments) -> bool:
    tensors = [moments.mean] if moments.std is None else [moments.mean, moments.std]
    # Two numbers of one pass over each: a NaN is both the smallest and the largest value.
    return all(math.isfinite(value) for tensor in tensors for value in tensor.aminmax())
