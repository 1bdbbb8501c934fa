"""From the keys of a dataset entry to the rules for its images: sizes, captions, and what makes an entry unusable."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from simpletuner.config.datasets import ConditioningDataset, CropStyle, ImageDataset
from simpletuner.config.options.data import DataOptions
from simpletuner.data.buckets import BucketRules
from simpletuner.data.captions import CaptionRules, CaptionSource
from simpletuner.errors import Problem
from simpletuner.families.spec import FamilySpec


def check_entry(entry: ImageDataset, options: DataOptions, spec: FamilySpec, data_file: str | None) -> list[Problem]:
    """What makes an entry unusable before any file is read."""

    def problem(key: str, message: str, allowed: str | None = None, fix: str | None = None) -> Problem:
        return Problem(message, key=f"{entry.id}.{key}", file=data_file, allowed=allowed, fix=fix)

    problems = []
    folder = entry.instance_data_dir
    if folder is not None and not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        problems.append(problem("instance_data_dir", f"{folder} {what}", "a folder with images", "correct the path"))
    if entry.resolution is None:
        problems.append(problem("resolution", "there is no resolution in this unit", fix="set it in this entry"))
    if entry.crop and entry.crop_aspect in ("closest", "random") and not entry.crop_aspect_buckets:
        problems.append(
            problem(
                "crop_aspect_buckets", f"crop_aspect {entry.crop_aspect} needs aspects to choose from", "[1.0, 0.75]"
            )
        )
    needs_prompt = entry.caption_strategy == "instanceprompt" or entry.only_instance_prompt
    if (needs_prompt or entry.prepend_instance_prompt) and not entry.instance_prompt:
        problems.append(problem("instance_prompt", "the captions need a prompt", "a text, or a list of texts"))
    alignment = options.aspect_bucket_alignment
    if alignment is not None and alignment % spec.size_multiple:
        problems.append(
            Problem(
                f"sides of images would be multiples of {alignment} pixels",
                key="aspect_bucket_alignment",
                allowed=f"multiples of {spec.size_multiple}, as {spec.title} needs",
            )
        )
    return problems


def bucket_rules(entry: ImageDataset, options: DataOptions, spec: FamilySpec) -> BucketRules:
    """The sizes of a dataset; the entry has passed `check_entry`."""
    assert entry.resolution is not None
    assert entry.resolution_type is not None
    return BucketRules(
        resolution=entry.resolution,
        resolution_type=entry.resolution_type,
        crop=entry.crop,
        crop_aspect=entry.crop_aspect,
        crop_style=cast(CropStyle, entry.crop_style),  # "face" is refused with the file
        aspect_buckets=tuple((bucket.aspect, bucket.weight) for bucket in entry.crop_aspect_buckets or ()),
        minimum_size=entry.minimum_image_size or 0,
        maximum_size=entry.maximum_image_size,
        target_size=entry.target_downsample_size,
        minimum_aspect=entry.minimum_aspect_ratio,
        maximum_aspect=entry.maximum_aspect_ratio,
        max_upscale=entry.max_upscale_threshold,
        alignment=options.aspect_bucket_alignment or spec.size_multiple,
        aspect_decimals=options.aspect_bucket_rounding,
        enlarges=entry.enlarge,
        max_side=entry.maximum_side,
        stretches=spec.stretches and not entry.enlarge,
    )


def latents_folder(entry: ImageDataset | ConditioningDataset, cache_dir: Path, spec: FamilySpec) -> Path:
    """Where the latents of a dataset, or of a folder of references, are kept; of records a folder for each part."""
    return Path(entry.cache_dir_vae or cache_dir / "vae" / spec.name / entry.id)


def caption_rules(entry: ImageDataset) -> CaptionRules:
    """The captions of a dataset; the entry has passed `check_entry`."""
    strategy = "table" if entry.has_caption_table or entry.caption_strategy == entry.type else entry.caption_strategy
    return CaptionRules(
        strategy=cast(CaptionSource, strategy),  # the others are refused with the file
        instance_prompts=tuple(entry.instance_prompt or ()),
        only_instance_prompt=entry.only_instance_prompt,
        prepend_instance_prompt=entry.prepend_instance_prompt,
        splits_lines=not entry.disable_multiline_split,
        fallback=entry.caption_fallback,
    )
