"""Images of a dataset as they are trained on, for people to look at: the very crops that the VAE gets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from simpletuner.batch import Sample
from simpletuner.data.dataset import Dataset
from simpletuner.data.reading import to_image

# Rounding to the alignment enlarges nearly everything by a little, which nobody sees.
NOTICEABLE = 1.05


@dataclass(frozen=True)
class Tile:
    """One image as it is trained on.

    Args:
        image: the crop, at its training size.
        caption: one of its captions.
        path: of the file, relative to its folder.
        note: sizes and what the crop leaves, one line.
        is_enlarged: noticeably.
        mask: where the loss counts, at the size of the crop; None where there is none.
        references: what the model sees beside the caption, as it sees them.
    """

    image: Image.Image
    caption: str
    path: str
    note: str
    is_enlarged: bool
    mask: Image.Image | None = None
    references: tuple[Image.Image, ...] = ()

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """References, the image, and its mask."""
        return (*self.references, self.image, *([self.mask] if self.mask is not None else []))


def choose_images(dataset: Dataset, count: int) -> list[Tile]:
    """Up to `count` images spread over the sizes, and within a size over the paths."""
    tiles = []
    folders = {each.id: each for each in dataset.references}
    for position in spread(dataset, count):
        sample = dataset.samples[position]
        image = to_image(dataset.read_pixels(sample))
        mask = None if dataset.masks is None else mask_image(dataset.masks.pixels(position, sample))
        is_enlarged = enlargement(sample) > NOTICEABLE
        references = tuple(to_image(folders[each.dataset_id].read_pixels(each)) for each in sample.references)
        note = size_note(sample)
        tiles.append(Tile(image, sample.captions[0], sample.path, note, is_enlarged, mask, references))
    return tiles


def spread(dataset: Dataset, count: int) -> list[int]:
    """Positions of samples: each size gets its share, and at least one image while there is room."""
    buckets = sorted(dataset.buckets.items(), key=lambda item: (-len(item[1]), item[0]))[:count]
    total = sum(len(members) for _, members in buckets)
    room, chosen = min(count, total), []
    for index, (_, members) in enumerate(buckets):
        others = len(buckets) - index - 1
        share = max(1, round(count * len(members) / total))
        number = min(share, len(members), room - others)
        chosen += [int(members[place * len(members) // number]) for place in range(number)]
        room -= number
    return chosen


def mask_image(weights: Tensor) -> Image.Image:
    """(1, H, W) in [0, 1] -> the mask, white where the loss counts."""
    return Image.fromarray((weights[0] * 255).round().numpy().astype(np.uint8)).convert("RGB")


def enlargement(sample: Sample) -> float:
    return max(sample.crop.intermediate_height / sample.height, sample.crop.intermediate_width / sample.width)


def size_note(sample: Sample) -> str:
    """`640x480 > 512x384, 8 % cut off`: the file's size, the training size, and what happens between them."""
    crop = sample.crop
    notes = [f"{sample.width}x{sample.height} > {crop.width}x{crop.height}"]
    if enlargement(sample) > NOTICEABLE:
        notes.append(f"{enlargement(sample):.1f}x larger")
    cut_off = 1 - crop.height * crop.width / (crop.intermediate_height * crop.intermediate_width)
    if cut_off >= 0.01:
        notes.append(f"{100 * cut_off:.0f} % cut off")
    return ", ".join(notes)
