"""The images that validation edits: files that somebody named, or what training shows the model."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from simpletuner.data.backends.base import MAX_FILE_BYTES
from simpletuner.errors import DataError, Problem
from simpletuner.text import read_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from simpletuner.config.options.validation import ValidationOptions
    from simpletuner.data.dataset import Dataset


@dataclass(frozen=True)
class ReferenceImage:
    """An input image, by its content.

    Args:
        name: of its file, for reports.
        digest: sha256 of what is shown.
    """

    name: str
    digest: str
    image: Image = field(compare=False, repr=False)


def read_references(paths: Sequence[str | Path], key: str) -> tuple[ReferenceImage, ...]:
    """Image files, upright and in sRGB.

    Args:
        key: names them in errors.

    Raises:
        DataError: one cannot be read.
    """
    from simpletuner.data.transforms import UnusableImage, load_image

    images = []
    for path in paths:
        try:
            data = read_file(Path(path), MAX_FILE_BYTES)
            images.append(ReferenceImage(str(path), hashlib.sha256(data).hexdigest(), load_image(data)))
        except (OSError, ValueError, UnusableImage) as error:
            message = f"the image {path} cannot be used: {error}"
            raise DataError(Problem(message, key=key, fix="name another image")) from error
    return tuple(images)


def references_of_run(options: ValidationOptions, datasets: Sequence[Dataset], one: bool) -> tuple[ReferenceImage, ...]:
    """The input images of validation prompts that name none of their own.

    Args:
        one: the model sees one reference at a time.

    Raises:
        DataError: one cannot be read.
    """
    if options.validation_references is not None:
        return read_references(options.validation_references, "validation_references")
    return references_of_data(datasets, one)


def references_of_data(datasets: Sequence[Dataset], one_reference: bool = False) -> tuple[ReferenceImage, ...]:
    """The references of one image, as they are trained with: the first one that is held out, else the first of all.

    Args:
        one_reference: the model sees one at a time.

    Raises:
        DataError: a file has gone or changed since the scan.
    """
    from simpletuner.data.reading import shown_content, to_image

    with_references = [dataset for dataset in datasets if dataset.references]
    chosen = sorted(with_references, key=lambda dataset: dataset.kind != "eval")[:1]  # stable: file order within a kind
    for dataset in chosen:
        position = min(int(members[0]) for members in dataset.buckets.values())
        seen = dataset.samples[position].references[: 1 if one_reference else None]
        folders = {each.id: each for each in dataset.references}
        return tuple(
            ReferenceImage(
                f"{sample.dataset_id}/{sample.path}",
                shown_content(sample),
                to_image(folders[sample.dataset_id].read_pixels(sample)),
            )
            for sample in seen
        )
    return ()
