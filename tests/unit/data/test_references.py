"""Reference images belong to their images by path, and are cut with them or keep their own shape."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simpletuner.batch import Crop
from simpletuner.config.datasets import ConditioningDataset, ImageDataset
from simpletuner.data.buckets import BucketRules
from simpletuner.data.conditioning import Partners, reference_rules
from simpletuner.data.holdout import hold_out, place_of
from simpletuner.data.reading import shown_content
from simpletuner.data.references import ReferenceRules, References, plan_reference
from simpletuner.data.report import SKIPPED_FILE, write_report
from simpletuner.errors import DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.training.latents import without
from simpletuner.validation.references import references_of_data, references_of_run
from tests.unit.data.images import build_datasets, options, write_image


def build(root: Path, kind: str = "reference_strict", folders: tuple[str, ...] = ("sources",), **changes):
    entries = [
        ImageDataset(id="targets", instance_data_dir=root / "targets", conditioning_data=list(folders), **changes),
        *(ConditioningDataset(id=name, instance_data_dir=root / name, conditioning_type=kind) for name in folders),
    ]
    (dataset,) = build_datasets(entries, options(), OMNIGEN, root / "work", data_file="data.json")
    return dataset


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Targets, and sources that are the same images, one of them as another kind of file."""
    for number, (width, height) in enumerate([(64, 64), (100, 64), (64, 120)]):
        write_image(tmp_path / f"targets/sub/a_{number}.png", width, height, seed=number)
        write_image(tmp_path / f"sources/sub/a_{number}.{'bmp' if number == 1 else 'png'}", width, height, seed=number)
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [
        {"crop_style": "center"},
        {"crop_style": "random", "random_flip": True},
        {"crop_style": "random", "random_flip": True, "vae_cache_clear_each_epoch": True},
    ],
)
def test_a_strict_reference_that_is_the_image_is_cut_to_the_same_pixels(pairs: Path, changes) -> None:
    """No side needs resizing here, so a cut one pixel off, or the other side up, would show."""
    dataset = build(pairs, **changes)
    flips = set()
    for round_number in range(3):
        for sample in dataset.samples.take(range(3), round_number):
            (reference,) = sample.references
            flips.add(sample.is_flipped)
            assert reference.dataset_id == "sources"
            assert torch.equal(dataset.references[0].read_pixels(reference), dataset.read_pixels(sample))
    assert len(flips) == (2 if "random_flip" in changes else 1)


def test_the_encoders_of_prompts_are_given_what_the_vae_is_given(pairs: Path) -> None:
    dataset = build(pairs, "reference_loose", random_flip=True)
    shapes = set()
    for sample in dataset.samples:
        [[plain], [mirrored]] = dataset.prompt_images([sample.references, sample.mirrored().references])
        crop = sample.references[0].crop
        assert (plain.height, plain.width) == (crop.height, crop.width)
        pixels = torch.from_numpy(np.array(plain.load())).permute(2, 0, 1) / 127.5 - 1
        expected = dataset.references[0].read_pixels(sample.references[0])
        torch.testing.assert_close(pixels.float(), expected, rtol=0, atol=0.005)
        assert np.array_equal(np.array(mirrored.load()), np.array(plain.load())[:, ::-1])
        assert plain.content != mirrored.content
        shapes.add((plain.height > plain.width) - (plain.height < plain.width))
    assert shapes == {-1, 0, 1}


def test_both_versions_of_a_mirrored_pair_are_kept(pairs: Path) -> None:
    dataset = build(pairs, random_flip=True)
    kept = list(dataset.samples_to_keep())
    assert len({(sample.path, sample.is_flipped) for sample in kept}) == 6
    assert all(sample.references[0].is_flipped == sample.is_flipped for sample in kept)


def test_several_references_come_in_the_order_in_which_they_are_named(pairs: Path) -> None:
    for number in range(3):
        write_image(pairs / f"styles/sub/a_{number}.png", 48, 32, seed=10 + number)
    dataset = build(pairs, "reference_loose", ("styles", "sources"))
    assert [each.dataset_id for each in dataset.samples[0].references] == ["styles", "sources"]
    assert [each.path for each in dataset.samples[1].references] == ["sub/a_1.png", "sub/a_1.bmp"]


@pytest.mark.parametrize(
    ("height", "width", "resolution", "kind", "expected"),
    [
        # Small enough: only what is over a multiple of 16 is cut off, 100 = 96 + 2 x 2 and 64 stays.
        (64, 100, 256, "pixel_area", Crop(64, 100, 0, 2, 64, 96)),
        # 2048 x 512 is 1024 squared; reduced to 512 squared it is 1024 x 256.
        (512, 2048, 512, "pixel_area", Crop(256, 1024, 0, 0, 256, 1024)),
        # Shorter side 300 -> 160, the other 600 -> 320.
        (300, 600, 160, "pixel", Crop(160, 320, 0, 0, 160, 320)),
        # 0.25 megapixels: 1000 x 1000 -> 500 x 500 -> 496 x 496, a multiple of 16.
        (1000, 1000, 0.25, "area", Crop(496, 496, 0, 0, 496, 496)),
        # Not enlarged, but to one tile of 16.
        (8, 40, 256, "pixel_area", Crop(16, 80, 0, 24, 16, 32)),
    ],
)
def test_a_loose_reference_is_only_reduced(height, width, resolution, kind, expected) -> None:
    assert plan_reference(height, width, ReferenceRules(False, resolution, kind, 16)) == expected


def test_a_loose_reference_fits_the_longest_side_of_the_family() -> None:
    crop = plan_reference(100, 4000, ReferenceRules(False, 10_000, "pixel_area", 16, max_side=1024))
    assert (crop.height, crop.width) == (16, 1024)


def test_the_longest_side_of_references_is_that_of_a_wide_one_too() -> None:
    index: Any = SimpleNamespace(sizes=lambda ids: {(64, 200), (120, 64)})
    longest = {
        is_strict: References(
            ConditioningDataset(id="sources", instance_data_dir=Path("sources"), conditioning_type=kind),
            index,
            np.arange(2),
            ReferenceRules(is_strict, 10_000, "pixel_area", 16),
        ).largest_side()
        for is_strict, kind in ((False, "reference_loose"), (True, "reference_strict"))
    }
    assert longest == {False: 192, True: 0}  # 200 is 12 tiles of 16 and a rest; strict ones are as their images are


def test_an_image_without_a_reference_is_skipped_with_the_reason(pairs: Path) -> None:
    write_image(pairs / "targets/alone.png")
    write_image(pairs / "targets/torn.png")
    (pairs / "sources/torn.png").write_bytes(b"no image")
    write_image(pairs / "targets/square.png")
    write_image(pairs / "sources/square.png", 64, 128)
    dataset = build(pairs)
    assert [sample.path for sample in dataset.samples] == ["sub/a_0.png", "sub/a_1.png", "sub/a_2.png"]
    write_report(pairs, [dataset.filter_report])
    lines = [json.loads(line) for line in (pairs / SKIPPED_FILE).read_text().splitlines()]
    reported = {(line["path"], line["reason"].split(" (")[0]) for line in lines}
    assert reported == {
        ("alone.png", "no reference image in sources"),
        ("torn.png", "no reference image in sources"),
        ("torn.png", "reference image in sources: not an image, or of a format that is not read"),
        ("square.png", "its reference image in sources has another shape"),
    }
    assert len(build(pairs, "reference_loose").samples) == 4


def test_no_pair_at_all_ends_the_start(pairs: Path) -> None:
    for path in (pairs / "sources/sub").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"none of the 3 images .* 3 x no reference image in sources"):
        build(pairs)


def test_the_fingerprint_knows_the_references(pairs: Path) -> None:
    first = build(pairs).fingerprint
    assert build(pairs).fingerprint == first
    assert build(pairs, "reference_loose").fingerprint != first
    write_image(pairs / "sources/sub/a_0.png", 64, 64, seed=99)
    assert build(pairs).fingerprint != first


def test_an_image_goes_with_a_reference_that_cannot_be_encoded(pairs: Path) -> None:
    dataset = build(pairs)
    bad = {("sources", "sub/a_1.bmp"): "its latents are not finite", ("targets", "sub/a_2.png"): "damaged"}
    left = without(dataset, bad)
    assert [left.samples[int(place)].path for members in left.buckets.values() for place in members] == ["sub/a_0.png"]
    assert left.filter_report.bucketed == 1
    assert {"sources: its latents are not finite", "damaged"} <= left.filter_report.skipped.counts.keys()
    with pytest.raises(DataError, match="no image of dataset targets can be encoded"):
        without(dataset, {("sources", f"sub/a_{number}.{'bmp' if number == 1 else 'png'}"): "x" for number in range(3)})


def test_validation_edits_the_first_image_that_is_held_out_else_the_first_of_all(pairs: Path) -> None:
    dataset = build(pairs)
    assert [each.name for each in references_of_data([dataset])] == ["sources/sub/a_0.png"]
    assert references_of_data([]) == ()
    shutil.copytree(pairs / "sources", pairs / "others")
    two = build(pairs, folders=("sources", "others"))
    run: Any = SimpleNamespace(validation_references=None)
    for one, expected in ((True, ["sources/sub/a_0.png"]), (False, ["sources/sub/a_0.png", "others/sub/a_0.png"])):
        assert [each.name for each in references_of_run(run, [two], one)] == expected
    [seen] = references_of_data([dataset])
    with Image.open(pairs / "sources/sub/a_0.png") as image:
        assert np.array_equal(np.asarray(seen.image), np.asarray(image.convert("RGB")))
    run.validation_references = (pairs / "sources/sub/a_2.png",)
    assert [each.name for each in references_of_run(run, [two], False)] == [str(pairs / "sources/sub/a_2.png")]
    _, middle, last = sorted(place_of(digest) for _, digest in dataset.used_digests())
    trained, held = hold_out([dataset], (middle + last) / 2)
    position = min(int(members[0]) for members in held.buckets.values())
    expected = f"sources/{dataset.samples[position].references[0].path}"
    assert [each.name for each in references_of_data([trained, held])] == [expected]
    assert min(int(members[0]) for members in trained.buckets.values()) != position


def sizes_of(limit: int | None = None, **keys: object) -> ReferenceRules:
    entry = ConditioningDataset(id="sources", instance_data_dir="x", conditioning_type="reference_loose", **keys)
    rules = BucketRules(0.5, "area", alignment=32)
    return reference_rules(entry, ImageDataset(id="targets"), rules, replace(OMNIGEN, max_size=limit))


def test_sizes_of_references_are_those_of_their_entry_else_of_the_images_and_of_the_family() -> None:
    assert sizes_of() == ReferenceRules(False, 0.5, "area", 32, None)
    assert sizes_of(resolution=512, resolution_type="pixel") == ReferenceRules(False, 512, "pixel", 32, None)
    longest = [sizes_of(limit, **keys).max_side for limit in (None, 900) for keys in ({}, {"maximum_side": 1000})]
    assert longest == [None, 1000, 900, 900]
    assert sizes_of(1200, maximum_side=1000).max_side == 1000


def test_references_are_told_apart_by_folder_content_and_sizes() -> None:
    def fingerprint(name: str = "a", content: str = "x", **keys: object) -> str:
        entry: Any = SimpleNamespace(id=name)
        folder: Any = SimpleNamespace(catalog=SimpleNamespace(images_digest=content))
        return Partners(entry, replace(sizes_of(), **keys), folder).fingerprint

    found = [fingerprint(), fingerprint("b"), fingerprint(content="y"), fingerprint(max_side=9)]
    found += [fingerprint(resolution=1.0), fingerprint(is_strict=True), fingerprint(stretches=True)]
    assert len(set(found)) == 7


def test_what_is_shown_has_a_name_of_its_own_for_each_cut_and_mirrored() -> None:
    kinds = [("a", 1, False), ("a", 1, True), ("a", 2, False), ("b", 1, False)]
    names = {
        shown_content(SimpleNamespace(digest=digest, crop=crop, is_flipped=mirrored))
        for digest, crop, mirrored in kinds
    }
    assert len(names) == 4
