"""Reading the cut-out part of one image from wherever it is, as the content that was indexed and no other."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING

from simpletuner.batch import Sample
from simpletuner.data.backends.base import Backend
from simpletuner.data.transforms import UnusableImage, checked_bytes, load_image, to_pixels
from simpletuner.errors import DataError, Problem
from simpletuner.text import printable

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def read_pixels(backend: Backend, sample: Sample, key: str) -> torch.Tensor:
    """The cut-out part of an image: (3, H, W) float32 in [-1, 1]. Safe to call from several threads.

    Args:
        key: names the folder in errors: dataset id and key.

    Raises:
        DataError: the file is gone, cannot be decoded, or is no longer the one that was indexed: what is made of it
            would be kept under the name of the old content.
    """
    again = "start the run again: the data is scanned again, and training continues from the last checkpoint"
    try:
        data = checked_bytes(backend.read(os.fsencode(sample.path)), sample.digest)
    except OSError as error:
        raise _unreadable(backend, sample, key, f"cannot be read: {error.strerror or error}", again) from error
    except UnusableImage as error:
        raise _unreadable(backend, sample, key, str(error), again) from error
    try:
        return to_pixels(load_image(data), sample.crop, sample.is_flipped)
    except UnusableImage as error:
        raise _unreadable(backend, sample, key, str(error), "repair the image or take it out of the dataset") from error


def to_image(pixels: torch.Tensor) -> Image:
    """(3, H, W) in [-1, 1] -> the image."""
    import numpy as np
    from PIL import Image

    values = ((pixels + 1) * 127.5).round().clamp(0, 255).permute(1, 2, 0).numpy()
    return Image.fromarray(values.astype(np.uint8))


def shown_content(sample: Sample) -> str:
    """Names what of an image is shown: its content, its cut, and whether it is mirrored."""
    return hashlib.sha256(f"{sample.digest} {sample.crop} {sample.is_flipped}".encode()).hexdigest()


def _unreadable(backend: Backend, sample: Sample, key: str, what: str, fix: str) -> DataError:
    path = f"{backend.location.rstrip('/')}/{sample.path}"
    return DataError(Problem(f"the image {printable(path)} {what}", key=key, fix=fix))
