"""Bucket arithmetic against numbers worked out by hand."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from simpletuner.batch import Crop
from simpletuner.data.buckets import (
    BucketRules,
    _weighted_choice,
    aspect_choices,
    bucket_size,
    choose_aspect,
    has_allowed_aspect,
    is_large_enough,
    plan_crop,
    training_size,
)

SQUARE_512 = BucketRules(resolution=512, resolution_type="pixel_area", alignment=64)


@pytest.mark.parametrize("alignment", [8, 16, 64])
def test_a_resolution_of_64_pixels_gives_64_by_64(alignment: int) -> None:
    rules = BucketRules(resolution=64, resolution_type="pixel_area", alignment=alignment)
    assert plan_crop(64, 64, rules) == Crop(64, 64, 0, 0, 64, 64)


@pytest.mark.parametrize(
    ("resolution", "resolution_type", "alignment", "aspect", "expected"),
    [
        (1024, "pixel_area", 64, 1.0, (1024, 1024)),
        # 1024 * sqrt(1.5) = 1254.1 -> 19.6 * 64 -> 1280; 1024 / sqrt(1.5) = 836.1 -> 13.06 * 64 -> 832
        (1024, "pixel_area", 64, 1.5, (832, 1280)),
        (1024, "pixel_area", 64, 0.67, (1280, 832)),
        # sqrt(1.0 * 10^6) = 1000 -> 15.6 * 64 -> 1024
        (1.0, "area", 64, 1.0, (1024, 1024)),
        # 1000 / 16 = 62.5, half up -> 63 * 16
        (1.0, "area", 16, 1.0, (1008, 1008)),
        # sqrt(0.25 * 10^6) = 500 -> 7.8 * 64 -> 512; 512 * sqrt(2) = 724 -> 704; 512 / sqrt(2) = 362 -> 384
        (0.25, "area", 64, 2.0, (384, 704)),
        (512, "pixel", 64, 1.5, (512, 768)),
        # 512 / 0.75 = 682.7 -> 10.67 * 64 -> 704
        (512, "pixel", 64, 0.75, (704, 512)),
        (500, "pixel", 16, 1.0, (496, 496)),
    ],
)
def test_bucket_sizes(resolution, resolution_type, alignment, aspect, expected) -> None:
    rules = BucketRules(resolution=resolution, resolution_type=resolution_type, alignment=alignment)
    assert bucket_size(aspect, rules) == expected


def test_an_image_is_resized_to_cover_its_bucket_and_cut_in_the_center() -> None:
    # 768 high -> 512: factor 2/3; 1024 wide -> 682.67 -> 683; 683 - 512 = 171 left over, half of it 85.
    assert plan_crop(768, 1024, SQUARE_512) == Crop(512, 683, 0, 85, 512, 512)
    # 300 high must become 512: factor 1.7067; 200 wide would be 341, so the width decides: 512 / 200 = 2.56 -> 768
    assert plan_crop(300, 200, SQUARE_512) == Crop(768, 512, 128, 0, 512, 512)


def test_the_corner_is_the_top_left_one() -> None:
    rules = replace(SQUARE_512, crop_style="corner")
    assert plan_crop(768, 1024, rules) == Crop(512, 683, 0, 0, 512, 512)


def test_without_crop_the_aspect_stays_but_for_rounding() -> None:
    rules = replace(SQUARE_512, crop=False, crop_aspect="square", crop_style="corner", alignment=16)
    # aspect 1.33; 512 * sqrt(1.33) = 590.5 -> 592; 512 / sqrt(1.33) = 443.96 -> 448
    # 448 / 768 = 0.58333 and 592 / 1024 = 0.578: height decides; 1024 * 0.58333 = 597.3 -> 597; 5 left over, half 2
    assert plan_crop(768, 1024, rules) == Crop(448, 597, 0, 2, 448, 592)


OWN_SIZE = BucketRules(1024, "pixel_area", crop=False, alignment=16, enlarges=False, max_side=2048)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 961), (640, 960)),  # not larger than 1024 x 1024: its own size, rounded down
        ((1024, 1024), (1024, 1024)),
        ((2048, 2048), (1024, 1024)),
        ((3000, 2000), (1248, 832)),  # sqrt(1048576 / 6000000) = 0.418: 1254 and 836
        ((4096, 200), (2048, 96)),  # the area would do, the side decides: 2048 and 100
    ],
)
def test_an_image_that_is_not_enlarged_keeps_its_own_size_up_to_the_limits(size, expected) -> None:
    crop = plan_crop(*size, OWN_SIZE)
    assert (crop.height, crop.width) == training_size(*size, OWN_SIZE)
    assert (crop.height, crop.width) == expected
    assert crop.intermediate_height <= size[0]
    assert crop.intermediate_width <= size[1]


def test_larger_images_are_reduced_to_the_target_before_the_cut() -> None:
    rules = replace(SQUARE_512, maximum_size=1024, target_size=768)
    # equal-area side of 2048 x 2048 is 2048 > 1024: reduced to 768, of which 512 is cut; (768 - 512) / 2 = 128
    assert plan_crop(2048, 2048, rules) == Crop(768, 768, 128, 128, 512, 512)
    # 1000 is not above the maximum: reduced as far as the cut allows
    assert plan_crop(1000, 1000, rules) == Crop(512, 512, 0, 0, 512, 512)


def test_the_target_never_leaves_less_than_the_cut() -> None:
    """The quickstart: resolution, maximum and target are all 512; 1024 x 768 of equal area would be 443 high."""
    rules = replace(SQUARE_512, maximum_size=512, target_size=512)
    assert plan_crop(768, 1024, rules) == Crop(512, 683, 0, 85, 512, 512)


def test_target_in_megapixels_scales_by_the_root() -> None:
    rules = BucketRules(
        resolution=0.25, resolution_type="area", alignment=64, maximum_size=1.0, target_size=1.0, crop_style="corner"
    )
    # 4 MP -> 1 MP halves the sides: 2000 -> 1000
    assert plan_crop(2000, 2000, rules) == Crop(1000, 1000, 0, 0, 512, 512)


@pytest.mark.parametrize(
    ("resolution_type", "minimum", "large", "small"),
    [
        ("pixel", 512, (512, 900), (511, 900)),
        ("area", 0.5, (1000, 500), (999, 500)),
        ("pixel_area", 512, (256, 1024), (256, 1023)),
        ("pixel_area", 0, (1, 1), None),
    ],
)
def test_minimum_size(resolution_type, minimum, large, small) -> None:
    rules = BucketRules(resolution=64, resolution_type=resolution_type, minimum_size=minimum)
    assert is_large_enough(*large, rules)
    assert small is None or not is_large_enough(*small, rules)


def test_closest_takes_the_aspect_of_least_ratio() -> None:
    rules = replace(SQUARE_512, crop_aspect="closest", aspect_buckets=((0.5, 1.0), (1.0, 1.0), (2.0, 1.0)))
    assert choose_aspect(100, 145, rules) == 2.0  # sqrt(2) = 1.414 is the middle between 1 and 2
    assert choose_aspect(100, 138, rules) == 1.0
    assert choose_aspect(100, 60, rules) == 0.5


def test_random_aspects_follow_their_weights_and_their_key() -> None:
    rules = replace(SQUARE_512, crop_aspect="random", aspect_buckets=((0.5, 1.0), (1.0, 0.0), (2.0, 3.0)))
    generated = [choose_aspect(100, 100, rules, 1, "id", f"digest {number}") for number in range(4000)]
    counts = Counter(generated)
    assert counts[1.0] == 0
    assert 0.72 < counts[2.0] / 4000 < 0.78  # 3/4, standard deviation 0.007
    assert generated == [choose_aspect(100, 100, rules, 1, "id", f"digest {number}") for number in range(4000)]


def test_random_crops_lie_inside_reach_both_ends_and_depend_on_the_content() -> None:
    rules = BucketRules(resolution=64, resolution_type="pixel_area", crop_style="random", alignment=16)
    crops = [plan_crop(64, 67, rules, 7, "id", f"digest {number}") for number in range(300)]
    assert {crop.left for crop in crops} == {0, 1, 2, 3}
    assert {crop.top for crop in crops} == {0}
    assert plan_crop(64, 67, rules, 7, "id", "digest 5") == crops[5]
    tall = [plan_crop(67, 64, rules, 7, "id", f"digest {number}") for number in range(300)]
    assert {crop.top for crop in tall} == {0, 1, 2, 3}
    assert {crop.left for crop in tall} == {0}
    both = [plan_crop(100, 100, replace(rules, minimum_size=0, maximum_size=80, target_size=67), 7, "id", f"{n}")
            for n in range(100)]  # fmt: skip
    assert any(crop.top != crop.left for crop in both)


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize("resolution_type", ["pixel", "area", "pixel_area"])
def test_every_crop_lies_inside_the_resized_image(crop: bool, resolution_type) -> None:
    resolution = 0.3 if resolution_type == "area" else 500
    rules = BucketRules(resolution, resolution_type, crop=crop, crop_aspect="preserve", crop_style="random")
    for height in range(1, 2000, 97):
        for width in range(1, 2000, 83):
            cut = plan_crop(height, width, rules, 1, "id", "digest")
            assert cut.height % 64 == cut.width % 64 == 0
            assert 0 <= cut.top <= cut.intermediate_height - cut.height
            assert 0 <= cut.left <= cut.intermediate_width - cut.width


def test_the_limits_of_an_aspect_are_allowed_themselves() -> None:
    rules = replace(SQUARE_512, minimum_aspect=0.5, maximum_aspect=2.0)
    assert [has_allowed_aspect(100, width, rules) for width in (49, 50, 200, 201)] == [False, True, True, False]


def test_the_side_that_grows_most_decides_whether_an_image_may_grow() -> None:
    """400 x 512 to a square of 512: the short side grows by 28 %."""
    assert aspect_choices(400, 512, replace(SQUARE_512, max_upscale=0.2)) == ()
    assert aspect_choices(400, 512, replace(SQUARE_512, max_upscale=0.28)) == ((1.0, 1.0),)


@pytest.mark.parametrize(("uniform", "chosen"), [(0.0, 1.0), (0.2499, 1.0), (0.25, 2.0), (0.9999, 2.0)])
def test_an_aspect_is_chosen_up_to_its_share_and_never_without_a_weight(uniform: float, chosen: float) -> None:
    """Weights of 0, 1 and 3."""
    assert _weighted_choice(((0.5, 0.0), (1.0, 1.0), (2.0, 3.0)), uniform) == chosen


def test_aspects_are_rounded_half_up_to_the_decimals_of_the_rules_and_never_to_nothing() -> None:
    kept = replace(SQUARE_512, crop=False)
    assert choose_aspect(800, 100, kept) == 0.13  # 0.125; to even it would be 0.12
    assert choose_aspect(768, 1024, replace(kept, aspect_decimals=1)) == 1.3
    assert choose_aspect(1000, 1, kept) == 0.01
    assert choose_aspect(768, 1024, replace(SQUARE_512, crop_aspect="preserve")) == 1.33


def test_an_image_of_exactly_the_largest_size_is_not_reduced_to_the_target() -> None:
    rules = replace(SQUARE_512, maximum_size=1024, target_size=768)
    assert plan_crop(1024, 1024, rules) == Crop(512, 512, 0, 0, 512, 512)
    assert plan_crop(2048, 2048, replace(rules, crop=False)) == Crop(512, 512, 0, 0, 512, 512)


def test_what_is_not_enlarged_has_no_limit_of_growth() -> None:
    rules = replace(OWN_SIZE, max_upscale=0.01)
    assert aspect_choices(10, 20, rules) == ((2.0, 1.0),)
    assert aspect_choices(10, 20, replace(rules, enlarges=True)) == ()


def test_only_aspects_that_need_little_growth_are_chosen_from() -> None:
    """512 x 512 covers a square of 512; 384 x 704 and 704 x 384 want 704 pixels of it."""
    buckets = ((0.5, 1.0), (1.0, 2.0), (2.0, 1.0))
    rules = replace(SQUARE_512, crop_aspect="closest", aspect_buckets=buckets)
    assert aspect_choices(512, 512, rules) == buckets
    assert aspect_choices(512, 512, replace(rules, max_upscale=0.3)) == ((1.0, 2.0),)
    assert aspect_choices(512, 512, replace(rules, max_upscale=0.375)) == buckets


def test_content_decides_only_where_something_is_drawn() -> None:
    drawn = [{"crop_aspect": "random"}, {"crop_style": "random"}, {"crop_style": "random", "crop": False}, {}]
    assert [replace(SQUARE_512, **keys).needs_content for keys in drawn] == [True, True, False, False]
