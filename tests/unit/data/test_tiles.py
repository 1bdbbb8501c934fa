"""Which images of a dataset are shown to people: spread over its sizes and its paths."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.batch import Crop, Sample
from simpletuner.config.datasets import ImageDataset
from simpletuner.data.tiles import Tile, choose_images, enlargement, mask_image, size_note, spread
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.unit.data.images import build_datasets, options, write_image


def test_images_are_taken_from_all_sizes_and_from_all_over_their_paths() -> None:
    """Of 12 images 4: ten of one size give three, a third of them apart; two of another give one."""
    dataset: Any = SimpleNamespace(buckets={(64, 64): np.arange(2, 12), (64, 96): np.arange(2)})
    assert spread(dataset, 4) == [2, 5, 8, 0]
    assert spread(dataset, 1) == [2]
    assert spread(dataset, 99) == [*range(2, 12), 0, 1]
    # 98 % of the images would take all three places: the rare sizes keep one each.
    rare: Any = SimpleNamespace(
        buckets={(64, 64): np.arange(100), (96, 64): np.array([100]), (64, 96): np.array([101])}
    )
    assert spread(rare, 3) == [0, 101, 100]
    assert spread(rare, 4) == [0, 50, 101, 100]


def sample(width: int, height: int, crop: Crop) -> Sample:
    return Sample("d", "a.png", "0" * 64, width, height, ("a",), crop)


def test_the_note_says_width_by_height_what_grew_and_what_was_cut_off() -> None:
    # 640 x 480 at half its size is 320 x 240, of which 320 x 192 are left: a fifth is gone.
    assert size_note(sample(640, 480, Crop(240, 320, 24, 0, 192, 320))) == "640x480 > 320x192, 20 % cut off"
    assert size_note(sample(640, 480, Crop(240, 320, 0, 0, 240, 320))) == "640x480 > 320x240"
    # Twelve lines of 240 are a twentieth, and one is less than a percent.
    assert size_note(sample(640, 480, Crop(240, 320, 6, 0, 228, 320))) == "640x480 > 320x228, 5 % cut off"
    assert size_note(sample(640, 480, Crop(240, 320, 0, 0, 239, 320))) == "640x480 > 320x239"
    assert size_note(sample(100, 80, Crop(160, 200, 0, 0, 160, 200))) == "100x80 > 200x160, 2.0x larger"


def test_the_side_that_grows_most_says_by_how_much_an_image_is_enlarged() -> None:
    assert enlargement(sample(100, 80, Crop(96, 110, 0, 0, 96, 110))) == pytest.approx(1.2)
    assert enlargement(sample(100, 80, Crop(88, 130, 0, 0, 88, 130))) == pytest.approx(1.3)


def test_a_mask_is_shown_rounded_to_its_nearest_gray() -> None:
    shown = mask_image(torch.tensor([[[0.0, 1.0], [0.5, 0.999]]]))
    assert [shown.getpixel(place) for place in ((0, 0), (1, 0), (0, 1), (1, 1))] == [
        (v,) * 3 for v in (0, 255, 128, 255)
    ]


@pytest.mark.parametrize(("side", "is_enlarged"), [(61, False), (60, True), (40, True)])
def test_an_image_that_grows_by_more_than_a_twentieth_is_said_to_be_enlarged(tmp_path, side, is_enlarged) -> None:
    """To 64 pixels: 64 / 61 is 1.049, 64 / 60 is 1.067."""
    write_image(tmp_path / "images" / "a_thing.png", side, side)
    entry = ImageDataset(id="things", instance_data_dir=tmp_path / "images")
    (dataset,) = build_datasets([entry], options(), OMNIGEN, tmp_path / "work")
    [tile] = choose_images(dataset, 3)
    assert (tile.is_enlarged, tile.caption, tile.path, tile.image.size) == (
        is_enlarged,
        "a thing",
        "a_thing.png",
        (64, 64),
    )


def test_references_come_before_their_image_and_its_mask_behind_it() -> None:
    image, mask, reference = (Image.new("RGB", (side, 8)) for side in (1, 2, 3))
    assert Tile(image, "a", "a.png", "", False, mask, (reference,)).images == (reference, image, mask)
    assert Tile(image, "a", "a.png", "", False).images == (image,)
