"""From the size of an image to the size it is trained at, and the part of it that is cut out.

Images of one batch must have one size, so each image is given to a bucket: a (height, width) whose sides are
multiples of `alignment`, whose area (or shorter side) follows `resolution`, and whose aspect follows the image's or
is prescribed. Everything here is arithmetic on integers and keyed draws; no image is opened. Rounding is half up,
never to even, so that sizes can be checked by hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simpletuner.batch import Crop
from simpletuner.randomness import keyed_uniform

if TYPE_CHECKING:
    from simpletuner.config.datasets import CropAspect, CropStyle, ResolutionType

BucketSize = tuple[int, int]  # height and width of the images that are trained together


@dataclass(frozen=True)
class BucketRules:
    """How one dataset turns image sizes into training sizes.

    Args:
        resolution: shorter side in pixels (`pixel`), megapixels (`area`), or side in pixels of the square of equal
            area (`pixel_area`). The three sizes below are in the same unit.
        resolution_type: what `resolution` measures.
        crop: False keeps the image's aspect; only what rounding to `alignment` leaves over is cut off, centered.
        crop_aspect: aspect of what is cut out; read only where `crop` is True.
        crop_style: where it is cut out; `corner` is the top left one.
        aspect_buckets: (aspect, weight) to choose from, for `closest` and `random`; aspect is width / height.
        minimum_size: smaller images are not used; 0 takes all.
        maximum_size: larger images are first reduced to `target_size`, then cut; None reduces every image as far
            as the cut allows.
        target_size: see `maximum_size`.
        minimum_aspect: images whose width / height is smaller are not used.
        maximum_aspect: images whose width / height is larger are not used.
        max_upscale: images whose sides would grow by more than this share are not used, and of several aspects only
            those that need less are chosen from; None allows any growth.
        alignment: pixels; every side is a multiple of it.
        aspect_decimals: the aspect is rounded to so many places, so that nearly equal aspects share a bucket.
        enlarges: False keeps the size of images that are not larger than `resolution`; only where `crop` is False.
        max_side: pixels; longer images are reduced to it. Read only where nothing is enlarged.
        stretches: sides are stretched to a multiple of `alignment` where nothing is enlarged, so that nothing is cut.
    """

    resolution: float
    resolution_type: ResolutionType
    crop: bool = True
    crop_aspect: CropAspect = "square"
    crop_style: CropStyle = "center"
    aspect_buckets: tuple[tuple[float, float], ...] = ()
    minimum_size: float = 0
    maximum_size: float | None = None
    target_size: float | None = None
    minimum_aspect: float | None = None
    maximum_aspect: float | None = None
    max_upscale: float | None = None
    alignment: int = 64
    aspect_decimals: int = 2
    enlarges: bool = True
    max_side: int | None = None
    stretches: bool = False

    @property
    def needs_content(self) -> bool:
        """True where the crop depends on the image's digest, not on its size alone."""
        return self.crop and (self.crop_aspect == "random" or self.crop_style == "random")


def size_measure(height: int, width: int, resolution_type: ResolutionType) -> float:
    """What `resolution` is compared with: shorter side, megapixels, or side of the square of equal area."""
    if resolution_type == "pixel":
        return min(height, width)
    if resolution_type == "area":
        return height * width / 1e6
    return math.sqrt(height * width)


def is_large_enough(height: int, width: int, rules: BucketRules) -> bool:
    # Compared as products: the root of an image of exactly the minimum area may come out one ulp too small.
    if rules.resolution_type == "pixel_area":
        return height * width >= rules.minimum_size**2
    return size_measure(height, width, rules.resolution_type) >= rules.minimum_size


def has_allowed_aspect(height: int, width: int, rules: BucketRules) -> bool:
    aspect = width / height
    too_narrow = rules.minimum_aspect is not None and aspect < rules.minimum_aspect
    return not too_narrow and (rules.maximum_aspect is None or aspect <= rules.maximum_aspect)


def aspect_choices(height: int, width: int, rules: BucketRules) -> tuple[tuple[float, float], ...]:
    """The (aspect, weight) that an image may be trained at without growing too much; empty where there is none."""
    if rules.crop and rules.crop_aspect in ("closest", "random"):
        choices = rules.aspect_buckets
    else:
        choices = ((_fixed_aspect(height, width, rules), 1.0),)
    if rules.max_upscale is None or not rules.enlarges:
        return choices
    return tuple(choice for choice in choices if _growth(height, width, choice[0], rules) <= rules.max_upscale)


def _growth(height: int, width: int, aspect: float, rules: BucketRules) -> float:
    """By which share the sides of an image grow to cover the bucket of `aspect`."""
    target_height, target_width = bucket_size(aspect, rules)
    # 1.2 / 1 - 1 is a little above 0.2 in binary.
    return round(max(target_height / height, target_width / width) - 1, 9)


def bucket_size(aspect: float, rules: BucketRules) -> tuple[int, int]:
    """(height, width) of the bucket for an aspect (width / height).

    By area: the side of the aligned square is e, width e * sqrt(aspect), height e / sqrt(aspect), each aligned.
    By `pixel`: the shorter side is the aligned resolution, the other follows the aspect, aligned.
    """
    if rules.resolution_type == "pixel":
        short = _align(rules.resolution, rules.alignment)
        if aspect >= 1:
            return short, _align(short * aspect, rules.alignment)
        return _align(short / aspect, rules.alignment), short
    side = rules.resolution if rules.resolution_type == "pixel_area" else math.sqrt(rules.resolution * 1e6)
    edge = _align(side, rules.alignment)
    root = math.sqrt(aspect)
    return _align(edge / root, rules.alignment), _align(edge * root, rules.alignment)


def choose_aspect(height: int, width: int, rules: BucketRules, *key: int | str) -> float:
    """Aspect (width / height) that the image is trained at; `aspect_choices` is not empty for it.

    Args:
        key: (seed, dataset id, content digest); read for `random` only.
    """
    if not rules.crop or rules.crop_aspect in ("preserve", "square"):
        return _fixed_aspect(height, width, rules)
    choices = aspect_choices(height, width, rules)
    if rules.crop_aspect == "closest":
        return min((aspect for aspect, _ in choices), key=lambda aspect: abs(math.log(aspect * height / width)))
    return _weighted_choice(choices, keyed_uniform(*key, "aspect"))


def _fixed_aspect(height: int, width: int, rules: BucketRules) -> float:
    if rules.crop and rules.crop_aspect == "square":
        return 1.0
    # Rounding a very tall image to 0.00 would ask for an endless bucket.
    return max(_round_half_up(width / height, rules.aspect_decimals), 10.0**-rules.aspect_decimals)


def training_size(height: int, width: int, rules: BucketRules, *key: int | str) -> tuple[int, int]:
    """(height, width) that an image is trained at.

    Args:
        key: as in `choose_aspect`.
    """
    if not rules.enlarges:
        crop = _plan_own_size(height, width, rules)
        return crop.height, crop.width
    return bucket_size(choose_aspect(height, width, rules, *key), rules)


def _plan_own_size(height: int, width: int, rules: BucketRules) -> Crop:
    limits = (rules.resolution, rules.resolution_type, rules.alignment, rules.max_side)
    return plan_reduction(height, width, *limits, rules.stretches)


def plan_reduction(
    height: int,
    width: int,
    resolution: float,
    resolution_type: ResolutionType,
    alignment: int,
    max_side: int | None,
    stretches: bool = False,
) -> Crop:
    """An image reduced to `resolution` and `max_side` where it is larger, the rest of the alignment cut off.

    Only an image smaller than `alignment` is enlarged, to that.

    Args:
        stretches: the sides are stretched down to the alignment, and nothing is cut off.
    """
    ratio = resolution / size_measure(height, width, resolution_type)
    scale = min(1.0, math.sqrt(ratio) if resolution_type == "area" else ratio)
    if max_side is not None:
        scale = min(scale, max_side / max(height, width))
    target_height, target_width = (_align_down(side * scale, alignment) for side in (height, width))
    if stretches:
        return Crop(target_height, target_width, 0, 0, target_height, target_width)
    cover = max(target_height / height, target_width / width)
    resized_height = max(target_height, math.floor(height * cover + 0.5))
    resized_width = max(target_width, math.floor(width * cover + 0.5))
    top, left = (resized_height - target_height) // 2, (resized_width - target_width) // 2
    return Crop(resized_height, resized_width, top, left, target_height, target_width)


def plan_crop(height: int, width: int, rules: BucketRules, *key: int | str) -> Crop:
    """What becomes of an image of `height` x `width` pixels.

    The image is resized with its own aspect to the smallest size that covers the bucket; where it is larger than
    `maximum_size`, to `target_size` if that covers the bucket too. Then the bucket's size is cut out.

    Args:
        key: (seed, dataset id, content digest); read for random aspects and random crops only.
    """
    if not rules.enlarges:
        return _plan_own_size(height, width, rules)
    target_height, target_width = training_size(height, width, rules, *key)
    scale = max(target_height / height, target_width / width)
    if rules.crop and rules.maximum_size is not None and rules.target_size is not None:
        size = size_measure(height, width, rules.resolution_type)
        if size > rules.maximum_size:
            scale = max(scale, _scale_to(size, rules.target_size, rules.resolution_type))
    # The side that decides the scale must come out exact; `max` guards the last bit of the multiplication.
    resized_height = max(target_height, math.floor(height * scale + 0.5))
    resized_width = max(target_width, math.floor(width * scale + 0.5))
    top, left = _crop_corner(resized_height - target_height, resized_width - target_width, rules, *key)
    return Crop(resized_height, resized_width, top, left, target_height, target_width)


def _scale_to(size: float, target: float, resolution_type: ResolutionType) -> float:
    return math.sqrt(target / size) if resolution_type == "area" else target / size


def _crop_corner(spare_height: int, spare_width: int, rules: BucketRules, *key: int | str) -> tuple[int, int]:
    """(top, left) of the cut, given how many pixels are left over on each axis."""
    if not rules.crop or rules.crop_style == "center":
        return spare_height // 2, spare_width // 2
    if rules.crop_style == "corner":
        return 0, 0
    top = math.floor(keyed_uniform(*key, "top") * (spare_height + 1))
    left = math.floor(keyed_uniform(*key, "left") * (spare_width + 1))
    return top, left


def _weighted_choice(choices: tuple[tuple[float, float], ...], uniform: float) -> float:
    left = uniform * sum(weight for _, weight in choices)
    for value, weight in choices:
        left -= weight
        if left < 0:
            return value
    return choices[-1][0]


def _align(pixels: float, alignment: int) -> int:
    """The nearest multiple of `alignment`, at least one."""
    return max(alignment, math.floor(pixels / alignment + 0.5) * alignment)


def _align_down(pixels: float, alignment: int) -> int:
    # 511.9999 is 512 that a root has rounded.
    return max(alignment, math.floor(round(pixels, 6) / alignment) * alignment)


def _round_half_up(value: float, decimals: int) -> float:
    return math.floor(value * 10**decimals + 0.5) / 10**decimals
