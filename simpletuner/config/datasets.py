"""The entries of `multidatabackend.json`: one class per kind of dataset, every key declared once.

A misspelt or unknown key is an error here, as it is in `config.json`. Values that an entry leaves out and that
`config.json` has a default for are filled in by `with_defaults`, and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

from simpletuner.config.options.declare import REQUIRED, OptionInfo, describe_field, option
from simpletuner.config.values import Bool, FilePath, Float, Int, Text, TextOrList

LOCAL_ONLY = "only local folders are built"
SCHEDULES = "all datasets take part in the whole run"
CAPTION_SOURCES = "only filename, textfile and instanceprompt are built"

BackendType = Literal["local", "aws", "csv", "huggingface", "webshart", "memory"]
CaptionStrategy = Literal["filename", "textfile", "instanceprompt", "parquet", "csv", "huggingface", "webshart"]
MetadataBackend = Literal["discovery", "json", "parquet", "huggingface", "webshart"]
CropAspect = Literal["square", "preserve", "closest", "random"]
CropStyle = Literal["center", "corner", "random", "face"]
ResolutionType = Literal["pixel", "area", "pixel_area"]


class DatasetEntry(BaseModel):
    """What every entry has."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    id: Text = option(REQUIRED, help="Name of the dataset: unique, usable as a file name.", level="basic")
    type: BackendType = option(
        "local",
        help="Where the files are: `local` is a folder.",
        planned_values=dict.fromkeys(("aws", "csv", "huggingface", "webshart", "memory"), LOCAL_ONLY),
        level="basic",
    )
    disabled: Bool = option(False, help="Leave this entry out (`disable` is read too).", level="basic")


class ImageDataset(DatasetEntry):
    """Pictures to train on."""

    dataset_type: Literal["image"] = option("image", help="What the entry is for.", level="basic")
    instance_data_dir: FilePath = option(
        REQUIRED, help="Folder with the pictures; its subfolders are read too.", level="basic", path="input"
    )
    cache_dir_vae: FilePath | None = option(
        None, help="Folder of this dataset's latents. Unset: a folder in `cache_dir`.", path="output"
    )
    resolution: Float | None = option(None, help="As in `config.json`, for this dataset.", gt=0, level="basic")
    resolution_type: ResolutionType | None = option(None, help="As in `config.json`, for this dataset.", level="basic")
    minimum_image_size: Float | None = option(None, help="As in `config.json`, for this dataset.", ge=0)
    maximum_image_size: Float | None = option(None, help="As in `config.json`, for this dataset.", gt=0)
    target_downsample_size: Float | None = option(None, help="As in `config.json`, for this dataset.", gt=0)
    crop: Bool = option(
        True,
        help="Cut pictures to `crop_aspect`. Without it a picture keeps its aspect ratio, but for the rounding of its "
        "sides.",
        level="basic",
    )
    crop_aspect: CropAspect = option(
        "square",
        help="Shape of the crop: `square`, `preserve` (the picture's own), `closest` or `random` of "
        "`crop_aspect_buckets`.",
        level="basic",
    )
    crop_style: CropStyle = option(
        "center",
        help="Where the crop lies; `random` is keyed by seed, dataset and picture. `centre` is read too.",
        planned_values={"face": "face detection is not built"},
        level="basic",
    )
    crop_aspect_buckets: tuple[Float, ...] | None = option(
        None, help="Aspect ratios (width / height) of `crop_aspect` closest and random."
    )
    caption_strategy: CaptionStrategy | None = option(
        None,
        help="Where captions come from: the file's `filename`, a `textfile` beside it, or `instanceprompt`.",
        planned_values=dict.fromkeys(("parquet", "csv", "huggingface", "webshart"), CAPTION_SOURCES),
        level="basic",
    )
    instance_prompt: TextOrList | None = option(
        None, help="Caption of all pictures, or a list to draw from.", level="basic"
    )
    prepend_instance_prompt: Bool = option(False, help="Put `instance_prompt` in front of each caption.")
    only_instance_prompt: Bool = option(False, help="Use `instance_prompt` in place of each caption.")
    disable_multiline_split: Bool = option(
        False, help="A text file is one caption; otherwise each of its lines is a variant."
    )
    metadata_backend: MetadataBackend = option(
        "discovery",
        help="How sizes and captions are found: by reading the folder (`json` is an old name for it).",
        planned_values=dict.fromkeys(("parquet", "huggingface", "webshart"), "only discovery is built"),
    )
    repeats: Int = option(
        0,
        help="Extra passes over the pictures in each epoch: 0 shows each once, 1 twice.",
        ge=0,
        le=10**9,
        level="basic",
    )
    is_regularisation_data: Bool = option(
        False,
        help="Prior preservation: the target is the base model's own prediction. Needs an adapter. "
        "`is_regularization_data` is read too.",
    )
    skip_file_discovery: Text = option(
        "", help="Steps of the scan to leave out.", planned="the scan is incremental, nothing needs to be left out"
    )
    max_num_samples: Int | None = option(
        None, help="Use only so many pictures.", planned="all pictures of the folder are used", ge=1
    )
    probability: Float = option(
        1.0, help="Weight of the dataset.", planned="datasets are mixed in proportion to their size and repeats", ge=0
    )
    start_epoch: Int = option(1, help="First epoch of the dataset.", planned=SCHEDULES, neutral=(0,), ge=0)
    start_step: Int = option(0, help="First step of the dataset.", planned=SCHEDULES, ge=0)
    end_epoch: Int | None = option(None, help="Last epoch of the dataset.", planned=SCHEDULES, ge=0)
    end_step: Int | None = option(None, help="Last step of the dataset.", planned=SCHEDULES, ge=0)
    minimum_aspect_ratio: Float | None = option(
        None, help="Leave out narrower pictures.", planned="all aspect ratios are used", gt=0
    )
    maximum_aspect_ratio: Float | None = option(
        None, help="Leave out wider pictures.", planned="all aspect ratios are used", gt=0
    )
    max_upscale_threshold: Float | None = option(
        None, help="Leave out pictures that would be enlarged more.", planned="use minimum_image_size", gt=0
    )
    train_batch_size: Int | None = option(
        None, help="Another batch size for this dataset.", planned="one batch size serves all datasets", ge=1
    )
    text_embeds: Text | None = option(
        None, help="Id of the text_embeds entry.", planned="all datasets share one cache of captions"
    )
    vae_cache_clear_each_epoch: Bool | None = option(
        None, help="Draw new crops each epoch.", planned="crops stay the same in all epochs", neutral=(False,)
    )
    vae_cache_ondemand: Bool | None = option(
        None, help="As in `config.json`.", planned="set it in config.json, for all datasets"
    )
    vae_cache_disable: Bool | None = option(
        None, help="Never write latents.", planned="use vae_cache_ondemand in config.json", neutral=(False,)
    )
    hash_filenames: Bool = option(
        True, help="Name cache files by hash.", planned="cache entries are named by content", neutral=(False,)
    )
    preserve_data_backend_cache: Bool = option(
        False, help="Keep the list of files.", planned="the index is always kept and refreshed", neutral=(True,)
    )
    delete_unwanted_images: Bool = option(
        False, help="Delete pictures that are too small.", planned="files of yours are never deleted"
    )
    delete_problematic_images: Bool = option(
        False, help="Delete unreadable pictures.", planned="files of yours are never deleted"
    )
    caption_shuffle: Any = option(None, help="Shuffle tags.", planned="captions are used as they are", neutral=(False,))
    conditioning: Any = option(None, help="Generated conditioning.", planned="conditioning is not built")
    conditioning_data: Any = option(
        None, help="Ids of conditioning datasets.", planned="conditioning datasets are not built"
    )
    slider_strength: Float | None = option(None, help="Slider training.", planned="slider training is not built")
    video: Any = option(None, help="Video settings.", planned="only pictures are built")
    audio: Any = option(None, help="Audio settings.", planned="only pictures are built")
    grounding: Any = option(None, help="Grounding boxes.", planned="grounding is not built")
    parquet: Any = option(None, help="Parquet settings.", planned="only discovery is built")
    dataset_name: Text | None = option(None, help="Hub dataset.", planned=LOCAL_ONLY)
    aws_bucket_name: Text | None = option(None, help="S3 bucket.", planned=LOCAL_ONLY)


class EvalDataset(ImageDataset):
    """Pictures that are never trained on; the eval loss is computed on them."""

    dataset_type: Literal["eval"] = option("eval", help="What the entry is for.", level="basic")  # type: ignore[assignment]


class TextEmbedsDataset(DatasetEntry):
    """Where encoded captions are kept. Families whose denoiser reads tokens (OmniGen) keep nothing there."""

    dataset_type: Literal["text_embeds"] = option("text_embeds", help="What the entry is for.", level="basic")
    default: Bool = option(False, help="The cache of all datasets that name no other.")
    cache_dir: FilePath | None = option(
        None, help="Folder of the cache. Unset: a folder in `cache_dir`.", path="output"
    )
    write_batch_size: Int = option(128, help="Captions that are written at once.", planned="the cache chooses it", ge=1)
    caption_filter_list: Any = option(None, help="Edits of captions.", planned="captions are used as they are")
    preserve_data_backend_cache: Bool = option(
        False, help="Keep the list of files.", planned="the cache is always kept", neutral=(True,)
    )
    skip_file_discovery: Text = option("", help="Steps to leave out.", planned="nothing needs to be left out")
    instance_data_dir: Text = option("", help="Not used by caches.", planned="a cache has no pictures")


PictureDataset = ImageDataset | EvalDataset
Dataset = ImageDataset | EvalDataset | TextEmbedsDataset

DATASET_CLASSES: Mapping[str, type[DatasetEntry]] = {
    "image": ImageDataset,
    "eval": EvalDataset,
    "text_embeds": TextEmbedsDataset,
}
PLANNED_DATASET_TYPES: Mapping[str, str] = {
    "conditioning": "masks and reference pictures are not built",
    "video": "only pictures are built",
    "audio": "only pictures are built",
    "image_embeds": "latents are cached without an entry of their own; remove it",
    "conditioning_image_embeds": "masks and reference pictures are not built",
    "distillation_cache": "distillation is not built",
    "caption": "captions without pictures are not built",
    "grounding": "grounding is not built",
}

# Other spellings of dataset keys and values, all of which existing files use.
KEY_ALIASES: Mapping[str, str] = {
    "disable": "disabled",
    "is_regularization_data": "is_regularisation_data",
    "is_regularization": "is_regularisation_data",
    "is_regularisation": "is_regularisation_data",
}
VALUE_ALIASES: Mapping[tuple[str, str], str] = {
    ("crop_style", "centre"): "center",
    ("crop_style", "centered"): "center",
    ("metadata_backend", "json"): "discovery",
    ("caption_strategy", "instance_prompt"): "instanceprompt",
}
NO_LONGER_READ: Mapping[str, str] = {"disable_vae_cache": "vae_cache_disable"}

FROM_CONFIG = (
    *("resolution", "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size"),
    *("caption_strategy", "instance_prompt"),
)


@functools.cache
def dataset_options(dataset_type: str) -> Mapping[str, OptionInfo]:
    """Every declared key of a kind of dataset."""
    cls = DATASET_CLASSES[dataset_type]
    return {name: describe_field(name, info, dataset_type) for name, info in cls.model_fields.items()}


def dataset_types() -> tuple[str, ...]:
    """The kinds of dataset that are built."""
    return tuple(DATASET_CLASSES)


def with_defaults(entry: Dataset, config: Any) -> Dataset:
    """The entry with what it leaves out taken from `config`; entries without pictures come back unchanged.

    Sizes of an entry and of `config.json` are only comparable in the same unit: an entry that sets its own
    `resolution_type` takes no sizes from `config.json` unless that has the same type.
    """
    if not isinstance(entry, ImageDataset):
        return entry
    same_unit = entry.resolution_type in (None, config.resolution_type)
    sizes = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
    updates = {
        name: getattr(config, name)
        for name in FROM_CONFIG
        if getattr(entry, name) is None and (same_unit or name not in sizes)
    }
    return entry.model_copy(update=updates)


def backend_types() -> tuple[str, ...]:
    """Every `type` that is known, built or not."""
    return get_args(BackendType)
