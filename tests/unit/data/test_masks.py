"""Masks are cut as their images are, pixel by pixel, and belong to them by path."""

from __future__ import annotations

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.batch import Crop
from simpletuner.config.datasets import ConditioningDataset, ImageDataset, with_defaults
from simpletuner.data import datasets
from simpletuner.data.index import ImageRow
from simpletuner.data.masks import average_down
from simpletuner.data.pairing import _has_shape_of
from simpletuner.data.transforms import UnusableImage, load_mask
from simpletuner.errors import DataError, Problem
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.unit.data.images import build_datasets, options


def save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return path


def gray_noise(height: int, width: int, seed: int) -> np.ndarray:
    """(H, W) noise; as RGB all three channels are equal, so that an image's values are those of the mask."""
    return np.random.default_rng(seed).integers(0, 256, (height, width), np.uint8)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Images, and masks that are the same images."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    for number, (height, width) in enumerate([(64, 64), (64, 100), (120, 64), (64, 64)]):
        values = gray_noise(height, width, number)
        save(images / f"sub/a_{number}.png", np.stack([values] * 3, axis=-1))
        save(masks / f"sub/a_{number}.png", values)
    return images, masks


ONE_CAPTION = {"caption_strategy": "instanceprompt", "instance_prompt": "a thing"}


def build(folders: tuple[Path, Path], tmp_path: Path, kind: str = "mask", masking: float = 1.0, **changes):
    entries = [
        ImageDataset(
            id="things", instance_data_dir=folders[0], conditioning_data="masks", **{**ONE_CAPTION, **changes}
        ),
        ConditioningDataset(id="masks", instance_data_dir=folders[1], conditioning_type=kind),
    ]
    (dataset,) = build_datasets(
        entries, options(masked_loss_probability=masking), OMNIGEN, tmp_path / "work", data_file="data.json"
    )
    return dataset


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_style": "center"},
        {"crop_style": "corner"},
        {"crop_style": "random"},
        {"crop_style": "random", "random_flip": True},
        {"crop_style": "random", "random_flip": True, "vae_cache_clear_each_epoch": True},
    ],
)
def test_a_mask_that_is_the_image_is_cut_to_the_same_pixels(folders, tmp_path: Path, changes) -> None:
    """No side needs resizing here, so a cut one pixel off would show in every value."""
    dataset = build(folders, tmp_path, **changes)
    assert dataset.masks is not None
    for round_number in range(3):
        for position, sample in enumerate(dataset.samples.take(range(4), round_number)):
            image = (dataset.read_pixels(sample)[:1] + 1) / 2
            mask = dataset.masks.pixels(position, sample)
            torch.testing.assert_close(mask, image, atol=1e-6, rtol=0)


def test_a_mask_of_half_the_size_serves_its_image(folders, tmp_path: Path) -> None:
    wide = np.zeros((32, 50), np.uint8)
    wide[:, 25:] = 255
    save(folders[1] / "sub/a_1.png", wide)
    dataset = build(folders, tmp_path, crop_style="corner")
    mask = dataset.masks.pixels(1, dataset.samples[1])
    # 64 x 100 from its top left corner: columns 0 .. 63, of which those from 50 on are in the right half.
    assert mask[0, :, :50].max() == 0
    assert mask[0, :, 50:].min() == 1


def test_masks_are_averaged_to_the_size_of_the_latents() -> None:
    pixels = torch.zeros(1, 16, 24)
    pixels[0, :8, :8] = 1
    pixels[0, 8:, 20:] = 1
    expected = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.0, 0.5]]])
    assert torch.equal(average_down(pixels, (2, 3)), expected)


def test_weights_have_the_size_of_the_latents(folders, tmp_path: Path) -> None:
    dataset = build(folders, tmp_path)
    sample = dataset.samples[0]
    weights = dataset.masks.weights(0, sample, (8, 8))
    values = gray_noise(64, 64, 0).astype(np.float64) / 255
    assert weights.shape == (1, 8, 8)
    assert np.allclose(weights[0].numpy(), values.reshape(8, 8, 8, 8).mean(axis=(1, 3)), atol=1e-6)
    assert torch.equal(dataset.masks.weights(0, sample, (8, 8)), weights)


def encoded(image: Image.Image, tmp_path: Path) -> bytes:
    path = tmp_path / "mask.png"
    image.save(path)
    return path.read_bytes()


WHOLE = Crop(2, 2, 0, 0, 2, 2)


@pytest.mark.parametrize(
    ("image", "kind", "expected"),
    [
        (Image.fromarray(np.array([[0, 255], [51, 204]], np.uint8)), "mask", [[0, 1], [0.2, 0.8]]),
        (Image.fromarray(np.array([[0, 255], [51, 1]], np.uint8)), "segmentation", [[0, 1], [1, 1]]),
        (Image.fromarray(np.array([[0, 65535], [257 * 51, 0]], np.uint16)), "mask", [[0, 1], [0.2, 0]]),
        (Image.fromarray(np.array([[False, True], [True, False]])), "mask", [[0, 1], [1, 0]]),
    ],
)
def test_values_of_masks(image: Image.Image, kind: str, expected, tmp_path: Path) -> None:
    weights = load_mask(encoded(image, tmp_path), WHOLE, binary=kind == "segmentation")
    assert torch.allclose(weights[0], torch.tensor(expected, dtype=torch.float32), atol=1e-6)


def test_what_is_transparent_is_not_trained_on(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[255, 255, 255, 0], [255, 255, 255, 255]]] * 2, np.uint8))
    for binary in (False, True):
        assert load_mask(encoded(image, tmp_path), WHOLE, binary=binary)[0].tolist() == [[0, 1], [0, 1]]


def test_a_color_counts_as_a_segment_whatever_its_brightness(tmp_path: Path) -> None:
    image = Image.fromarray(np.array([[[0, 0, 1], [0, 0, 0]]] * 2, np.uint8))
    assert load_mask(encoded(image, tmp_path), WHOLE, binary=True)[0].tolist() == [[1, 0], [1, 0]]


def test_the_extension_of_a_mask_may_differ(folders, tmp_path: Path) -> None:
    mask = folders[1] / "sub/a_3.png"
    values = np.asarray(Image.open(mask))
    mask.unlink()
    save(folders[1] / "sub/a_3.webp", np.where(values > 127, 255, 0).astype(np.uint8))
    assert build(folders, tmp_path).masks is not None


def test_missing_masks_are_listed(folders, tmp_path: Path) -> None:
    (folders[1] / "sub/a_0.png").unlink()
    (folders[1] / "sub/a_2.png").rename(folders[1] / "a_2.png")
    with pytest.raises(DataError) as caught:
        build(folders, tmp_path)
    text = str(caught.value)
    assert "data.json: things.conditioning_data: 2 of 4 images have no mask" in text
    assert "sub/a_0.png, sub/a_2.png" in text


def test_of_many_missing_masks_the_first_ten_are_listed(tmp_path: Path) -> None:
    for number in range(14):
        save(tmp_path / f"images/{number:02d}.png", gray_noise(64, 64, number))
    save(tmp_path / "masks/13.png", gray_noise(64, 64, 1))
    with pytest.raises(DataError, match=r"13 of 14 images have no mask .*: 00\.png, .*09\.png, \.\.\."):
        build((tmp_path / "images", tmp_path / "masks"), tmp_path)


def test_two_masks_that_could_be_meant_are_none(folders, tmp_path: Path) -> None:
    (folders[1] / "sub/a_0.png").rename(folders[1] / "sub/a_0.webp.gif.bmp")
    for suffix in (".bmp", ".webp"):
        save(folders[1] / f"sub/a_0{suffix}", gray_noise(64, 64, 0))
    with pytest.raises(DataError, match=r"1 of 4 images have no mask"):
        build(folders, tmp_path)


def test_a_mask_of_another_shape_is_no_mask(folders, tmp_path: Path) -> None:
    save(folders[1] / "sub/a_0.png", gray_noise(64, 96, 0))
    with pytest.raises(DataError, match=r"1 of 4 images have a mask of another shape.*sub/a_0\.png"):
        build(folders, tmp_path)


def test_a_changed_mask_changes_the_fingerprint_and_is_not_read_as_the_old_one(folders, tmp_path: Path) -> None:
    before = build(folders, tmp_path)
    save(folders[1] / "sub/a_0.png", gray_noise(64, 64, 77))
    with pytest.raises(DataError) as caught:
        before.masks.pixels(0, before.samples[0])
    assert caught.value.problems == [
        Problem(
            f"the mask sub/a_0.png in {folders[1]} cannot be used: changed since the run began",
            "masks.instance_data_dir",
            fix="start the run again: the folder is scanned again, and training continues from the last checkpoint",
        )
    ]
    assert build(folders, tmp_path).fingerprint != before.fingerprint
    assert build(folders, tmp_path, "segmentation").fingerprint != build(folders, tmp_path).fingerprint


def png_of_16_bit_colors(value: int) -> bytes:
    """2 x 2 pixels, each channel `value`: Pillow cannot write such a file."""
    pixels = struct.pack(">6H", *[value] * 6)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    content = zlib.compress((b"\0" + pixels) * 2)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


@pytest.mark.parametrize("suffix", [".png", ".tif", ".pgm"])
def test_a_16_bit_label_of_1_is_not_black(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / f"labels{suffix}", np.array([[0, 1], [4, 128]], np.uint16))
    assert load_mask(path.read_bytes(), WHOLE, binary=True)[0].tolist() == [[0, 1], [1, 1]]


def test_16_bit_brightness_is_not_rounded_to_8_bits(tmp_path: Path) -> None:
    path = save(tmp_path / "mask.png", np.array([[1, 100], [32768, 65535]], np.uint16))
    expected = torch.tensor([[1 / 65535, 100 / 65535], [32768 / 65535, 1]])
    torch.testing.assert_close(load_mask(path.read_bytes(), WHOLE)[0], expected)


@pytest.mark.parametrize("data", [png_of_16_bit_colors(1), b"P6 2 2 65535\n" + b"\0\1" * 12], ids=["png", "ppm"])
def test_16_bit_colors_that_lose_their_labels_are_refused_as_a_segmentation(data: bytes) -> None:
    with pytest.raises(UnusableImage, match="16-bit colors are read with 8 bits"):
        load_mask(data, WHOLE, binary=True)


def blacken(folders: tuple[Path, Path], *names: str, columns: slice = slice(None)) -> None:
    for name in names:
        path = folders[1] / "sub" / name
        with Image.open(path) as image:
            values = np.asarray(image).copy()
        values[:, columns] = 0
        save(path, values)


def test_an_image_whose_mask_is_black_is_named(folders, tmp_path: Path) -> None:
    assert build(folders, tmp_path).filter_report.warnings == ()
    blacken(folders, "a_2.png")
    (warning,) = build(folders, tmp_path).filter_report.warnings
    assert warning == (
        "things: 1 of 4 images have a mask that leaves nothing inside the crop and are not trained on: sub/a_2.png"
    )
    assert build(folders, tmp_path).filter_report.warnings == (warning,)  # from what was kept


def test_a_mask_that_marks_only_what_is_cut_off_is_named(folders, tmp_path: Path) -> None:
    # 64 x 100, cut in the center to columns 18 .. 81: what is left of the mask is outside.
    blacken(folders, "a_1.png", columns=slice(18, 82))
    assert "sub/a_1.png" in build(folders, tmp_path).filter_report.warnings[0]
    assert build(folders, tmp_path, crop=False).filter_report.warnings == ()
    moving = {"crop_style": "random", "vae_cache_clear_each_epoch": True}
    assert build(folders, tmp_path, **moving).filter_report.warnings == ()


def test_masks_that_leave_nothing_of_any_image_are_an_error(folders, tmp_path: Path) -> None:
    blacken(folders, *(f"a_{number}.png" for number in range(4)))
    with pytest.raises(DataError) as caught:
        build(folders, tmp_path)
    text = str(caught.value)
    assert "data.json: things.conditioning_data: 4 of 4 images have a mask that leaves nothing inside the crop" in text
    assert "sub/a_0.png, sub/a_1.png" in text


def test_a_mask_is_mirrored_with_its_image_whichever_was_asked_for_first(folders, tmp_path: Path) -> None:
    dataset = build(folders, tmp_path)
    sample = dataset.samples[0]
    plain, mirrored = (dataset.masks.weights(0, each, (8, 8)) for each in (sample, sample.mirrored()))
    torch.testing.assert_close(mirrored, plain.flip(-1), rtol=0, atol=1e-6)
    assert (mirrored - plain).abs().max() > 0.01
    assert torch.equal(dataset.masks.weights(0, sample, (8, 8)), plain)
    assert not torch.equal(dataset.masks.weights(3, dataset.samples[3], (8, 8)), plain)
    assert dataset.masks.weights(0, sample, (4, 4)).shape == (1, 4, 4)


def test_a_mask_follows_its_image_to_another_crop(folders, tmp_path: Path) -> None:
    """As crops that are chosen anew in each round ask for it: first the whole image, then its upper left quarter."""
    dataset = build(folders, tmp_path)
    sample = dataset.samples[0]
    crop = sample.crop
    doubled = replace(crop, intermediate_height=2 * crop.height, intermediate_width=2 * crop.width, top=0, left=0)
    whole = dataset.masks.weights(0, sample, (8, 8))
    quarter = dataset.masks.weights(0, replace(sample, crop=doubled), (8, 8))
    assert torch.equal(quarter, average_down(dataset.masks.pixels(0, replace(sample, crop=doubled)), (8, 8)))
    assert not torch.equal(quarter, whole)


def test_gray_is_not_black(folders, tmp_path: Path) -> None:
    save(folders[1] / "sub/a_2.png", np.full((120, 64), 1, np.uint8))
    assert build(folders, tmp_path).filter_report.warnings == ()


def test_empty_masks_that_count_half_of_the_time_leave_something_to_train_on(folders, tmp_path: Path) -> None:
    blacken(folders, *(f"a_{number}.png" for number in range(4)))
    (warning,) = build(folders, tmp_path, masking=0.5).filter_report.warnings
    assert "4 of 4 images" in warning
    assert "are not trained on whenever the mask counts" in warning


def test_a_mask_may_be_off_by_a_pixel_of_rounding(folders, tmp_path: Path) -> None:
    """Of an image of 64 x 100 at a quarter of its size: 16 x 24 for 16 x 25."""
    save(folders[1] / "sub/a_1.png", gray_noise(16, 24, 1))
    assert build(folders, tmp_path).num_images == 4


def test_masks_that_fill_the_memory_they_may_take_are_read_each_time(folders, tmp_path: Path, monkeypatch) -> None:
    dataset = build(folders, tmp_path)
    monkeypatch.setattr("simpletuner.data.masks._MEMO_BYTES", 8 * 8 * 4)  # one mask of float32

    def asked_twice(position: int) -> bool:
        found = [dataset.masks.weights(position, dataset.samples[position], (8, 8)) for _ in range(2)]
        return found[0] is found[1]

    assert [asked_twice(position) for position in range(3)] == [True, False, False]


def test_a_mask_may_be_off_by_one_pixel_or_by_a_fiftieth_of_its_height() -> None:
    """Of an image of 100 x 64: 78 wide is 49.92 high, and 1000 wide is 640, of which a fiftieth is 12.8."""
    image = ImageRow("a.png", "", 64, 100)

    def fits(height: int, width: int) -> bool:
        return _has_shape_of(ImageRow("a.png", "", height, width), image)

    assert [fits(height, 78) for height in (48, 49, 50, 51)] == [False, True, True, False]
    assert [fits(height, 1000) for height in (627, 628, 652, 653)] == [False, True, True, False]


def test_masks_of_crops_that_move_are_looked_at_whole(folders, tmp_path: Path) -> None:
    """Of 64 x 100 only the last row is left, which no turned mask would show."""
    last_row = np.zeros((64, 100), np.uint8)
    last_row[-1] = 255
    save(folders[1] / "sub/a_1.png", last_row)
    moving = {"crop_style": "random", "vae_cache_clear_each_epoch": True}
    assert build(folders, tmp_path, **moving).filter_report.warnings == ()
    blacken(folders, "a_1.png")
    [warning] = build(folders, tmp_path, **moving).filter_report.warnings
    assert "1 of 4 images have a mask that leaves nothing and are not trained on" in warning


def test_ten_of_ten_empty_masks_are_all_of_them(tmp_path: Path) -> None:
    for number in range(11):
        save(tmp_path / f"images/{number:02d}.png", np.stack([gray_noise(64, 64, number)] * 3, axis=-1))
        save(tmp_path / f"masks/{number:02d}.png", np.full((64, 64), 255 * (number == 10), np.uint8))
    [warning] = build((tmp_path / "images", tmp_path / "masks"), tmp_path).filter_report.warnings
    assert warning.startswith("things: 10 of 11 images")
    assert warning.endswith("08.png, 09.png")
    for number in (11, 12):
        save(tmp_path / f"images/{number}.png", np.stack([gray_noise(64, 64, number)] * 3, axis=-1))
        save(tmp_path / f"masks/{number}.png", np.zeros((64, 64), np.uint8))
    [warning] = build((tmp_path / "images", tmp_path / "masks"), tmp_path).filter_report.warnings
    assert warning.startswith("things: 12 of 13 images have a mask that leaves nothing inside the crop and are not")
    assert warning.endswith(" trained on: " + ", ".join(f"{number:02d}.png" for number in range(10)) + ", ...")


@pytest.mark.parametrize(("value", "weight"), [(65535, 1.0), (32768, 32768 / 65535), (100_000, 1.0)])
def test_16_bit_white_counts_whole_and_nothing_counts_more(tmp_path: Path, value: int, weight: float) -> None:
    image = Image.fromarray(np.full((2, 2), value, np.int32 if value > 65535 else np.uint16))
    path = tmp_path / "mask.tiff"
    image.save(path)
    assert load_mask(path.read_bytes(), WHOLE)[0, 0, 0].item() == pytest.approx(weight, abs=1e-7)


def test_what_is_brighter_than_white_counts_as_white_beside_black(tmp_path: Path) -> None:
    path = tmp_path / "mask.tiff"
    Image.fromarray(np.array([[100_000, 0]], np.int32)).save(path)
    assert load_mask(path.read_bytes(), Crop(1, 1, 0, 0, 1, 1)).item() == pytest.approx(0.5)


def test_how_far_the_reading_has_come_is_reported_for_images_and_masks(folders, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("simpletuner.data.empty_masks._CHUNK", 3)
    entries = [
        ImageDataset(
            id="things", instance_data_dir=folders[0], conditioning_data="masks", resolution=64, **ONE_CAPTION
        ),
        ConditioningDataset(id="masks", instance_data_dir=folders[1], conditioning_type="mask"),
    ]
    config = options()
    whole = [with_defaults(entry, config) for entry in entries]
    seen: list[tuple[str, int, int | None]] = []
    for _ in range(2):  # the second time all of it is known
        datasets.build_datasets(whole, config, OMNIGEN, tmp_path / "work", lambda *told: seen.append(told))
        assert seen == [
            *(("scanning things", 4, None), ("scanning masks", 4, None)),
            *(("reading masks of things", 3, 4), ("reading masks of things", 4, 4)),
        ]
