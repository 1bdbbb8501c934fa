"""Sizes and captions of the images of an entry."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.datasets import ImageDataset
from simpletuner.config.draft import Draft
from simpletuner.errors import Problem

# In the unit of `area`: larger numbers are pixels by mistake.
MAX_MEGAPIXELS = 20


def alignment_fits_the_family(draft: Draft) -> Iterator[Problem]:
    alignment = draft.config.data.aspect_bucket_alignment
    if draft.spec and alignment and alignment % draft.spec.size_multiple:
        multiple = draft.spec.size_multiple
        message = f"{alignment} is not a multiple of {multiple}, which {draft.spec.title} needs"
        yield draft.problem(message, "aspect_bucket_alignment", f"a multiple of {multiple}")


def resolution_fits_the_family(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        resolution, unit = entry.resolution, entry.resolution_type
        if resolution is None:
            message = f'is missing; that of config.json is of another resolution_type than "{unit}"'
            yield draft.dataset_problem(entry, "resolution", message, fix="set it in the entry")
            continue
        if unit == "area":
            if resolution > MAX_MEGAPIXELS:
                message = f"{resolution:g} megapixels are not an image size"
                fix = 'for pixels set resolution_type to "pixel_area"'
                yield draft.dataset_problem(entry, "resolution", message, f"at most {MAX_MEGAPIXELS}", fix)
            continue
        if resolution != int(resolution):
            message = f"{resolution:g} is not a whole number of pixels"
            fix = 'for megapixels set resolution_type to "area"'
            yield draft.dataset_problem(entry, "resolution", message, "a whole number", fix)
            continue
        yield from _sides_fit(draft, entry, resolution)


def _sides_fit(draft: Draft, entry: ImageDataset, resolution: float) -> Iterator[Problem]:
    if draft.spec is None:
        return
    smallest, largest = draft.spec.size_multiple, draft.spec.max_size
    if resolution < smallest or (largest and resolution > largest):
        allowed = f"{smallest} to {largest} pixels" if largest else f"at least {smallest} pixels"
        message = f"{resolution:g} pixels are outside of what {draft.spec.title} takes"
        fix = 'for megapixels set resolution_type to "area"' if resolution < smallest else None
        yield draft.dataset_problem(entry, "resolution", message, allowed, fix)


def size_limits_go_together(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        smallest, largest, target = entry.minimum_image_size, entry.maximum_image_size, entry.target_downsample_size
        if largest is not None and target is None:
            message = "is missing: maximum_image_size is set, and larger images need a size to go to"
            yield draft.dataset_problem(entry, "target_downsample_size", message, fix="set it, or remove the other")
        if target is not None and largest is None:
            message = "has no effect without maximum_image_size"
            yield draft.dataset_problem(entry, "target_downsample_size", message, fix="set both, or none")
        if largest is not None and target is not None and target > largest:
            message = f"{target:g} is above maximum_image_size, which is {largest:g}"
            yield draft.dataset_problem(entry, "target_downsample_size", message, f"at most {largest:g}")
        if smallest is not None and largest is not None and smallest > largest:
            message = f"{smallest:g} is above maximum_image_size, which is {largest:g}: no image would be left"
            yield draft.dataset_problem(entry, "minimum_image_size", message, f"at most {largest:g}")


def captions_have_their_source(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        prompts = [prompt for prompt in entry.instance_prompt or () if prompt.strip()]
        if prompts:
            continue
        wanted = [name for name in ("only_instance_prompt", "prepend_instance_prompt") if getattr(entry, name)] + (
            [f"caption_strategy {entry.caption_strategy}"] if entry.caption_strategy == "instanceprompt" else []
        )
        wanted += ["caption_fallback instanceprompt"] if entry.caption_fallback == "instanceprompt" else []
        if wanted:
            message = f"is missing: {wanted[0]} needs it"
            yield draft.dataset_problem(entry, "instance_prompt", message, "a text, or a list of texts")


def dropped_captions_serve_guidance(draft: Draft) -> Iterator[str]:
    if draft.config.training.caption_dropout_probability == 0 and "caption_dropout_probability" in draft.origins:
        yield (
            f"{draft.origin('caption_dropout_probability')}: caption_dropout_probability: 0 never trains the empty "
            "caption that guidance uses; long runs do better with 0.05 to 0.1"
        )


IMAGE_RULES = (
    alignment_fits_the_family,
    resolution_fits_the_family,
    size_limits_go_together,
    captions_have_their_source,
)
IMAGE_NOTICES = (dropped_captions_serve_guidance,)
