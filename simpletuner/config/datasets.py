"""The entries of `multidatabackend.json`: one class per kind of dataset, every key declared once.

A misspelled or unknown key is an error here, as it is in `config.json`. Values that an entry leaves out and that
`config.json` has a default for are filled in by `with_defaults`, and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from simpletuner.config.dataset_values import AspectBuckets, Shuffle, TagShuffle, Words
from simpletuner.config.options.catalog import TrainConfig
from simpletuner.config.options.declare import REQUIRED, OptionInfo, describe_field, option
from simpletuner.config.sources import TABLE_TYPES, BackendType, ImageSource
from simpletuner.config.values import Bool, FilePath, Float, Int, Text, TextOrList

LOCAL_ONLY = "masks and caches are in local folders"
CAPTION_SOURCES = "captions come from the image's name, a text file, a prompt, or a table (csv, parquet)"
SIZES_MEASURED = "images are always measured, and the index remembers their sizes"

CaptionStrategy = Literal[
    "filename", "textfile", "instanceprompt", "csv", "parquet", "huggingface", "records", "webshart"
]
ConditioningType = Literal["mask", "segmentation", "controlnet", "reference_strict", "reference_loose"]
MASK_TYPES = ("mask", "segmentation")
REFERENCE_TYPES = ("reference_strict", "reference_loose")
# Keys of conditioning entries, and the types that they act in.
REFERENCE_KEYS: Mapping[str, tuple[str, ...]] = {
    "resolution": ("reference_loose",),
    "resolution_type": ("reference_loose",),
    "maximum_side": ("reference_loose",),
    "cache_dir_vae": REFERENCE_TYPES,
}
MetadataBackend = Literal["discovery", "json", "parquet", "huggingface", "webshart"]
CropAspect = Literal["square", "preserve", "closest", "random"]
CropStyle = Literal["center", "corner", "random"]
RefusedCropStyle = Literal["face"]
ResolutionType = Literal["pixel", "area", "pixel_area"]


class DatasetEntry(BaseModel):
    """What every entry has."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    id: Text = option(REQUIRED, help="Name of the dataset: unique, usable as a file name.", level="basic")
    type: BackendType = option(
        "local",
        help="Where the files are: `local` is a folder.",
        planned_values=dict.fromkeys(("aws", "csv", "huggingface", "records", "webshart", "memory"), LOCAL_ONLY),
        level="basic",
    )
    disabled: Bool = option(False, help="Leave this entry out (`disable` is read too).", level="basic")


class ImageDataset(ImageSource, DatasetEntry):
    """Images to train on."""

    dataset_type: Literal["image"] = option("image", help="What the entry is for.", level="basic")
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
        help="Cut images to `crop_aspect`. Without it an image keeps its aspect ratio, but for the rounding of its "
        "sides.",
        level="basic",
    )
    crop_aspect: CropAspect = option(
        "square",
        help="Shape of the crop: `square`, `preserve` (the image's own), `closest` or `random` of "
        "`crop_aspect_buckets`.",
        level="basic",
    )
    crop_style: CropStyle | RefusedCropStyle = option(
        "center",
        help="Where the crop lies; `random` is keyed by seed, dataset and image. `centre` is read too.",
        planned_values={"face": "finding faces needs weights that no library includes; crop the images, or use center"},
        level="basic",
    )
    crop_aspect_buckets: AspectBuckets | None = option(
        None,
        takes="list of numbers or objects",
        help="Aspect ratios (width / height) of `crop_aspect` closest and random; for random also "
        '`{"aspect_bucket": 1.5, "weight": 2}`.',
    )
    enlarge: Bool = option(
        True,
        help="`false`, with `crop` false: an image that is not larger than `resolution` keeps its own size, its sides "
        "rounded down.",
    )
    maximum_side: Int | None = option(
        None, help="With `enlarge` false: images with a longer side are reduced to this.", unit="pixels", ge=64
    )
    random_flip: Bool = option(
        False,
        help="Flip half of the images left to right, resampled in each round by seed and image. Both versions "
        "are cached.",
    )
    caption_strategy: CaptionStrategy | None = option(
        None,
        help="Where captions come from: the file's `filename`, a `textfile` beside it, `instanceprompt`, or a table "
        "(`csv` or `parquet`, see `metadata_file`). Datasets of type csv, huggingface and records have them in their "
        "rows (`csv`, `huggingface`, `records`).",
        planned_values={"webshart": CAPTION_SOURCES},
        level="basic",
    )
    caption_fallback: Literal["filename", "instanceprompt"] | None = option(
        None,
        help="Caption of an image that `caption_strategy` finds none for: the words of its `filename`, or "
        "`instance_prompt` (a prompt, or the word for the class), which is also taken where the name is a camera's. "
        "Unset: such an image is an error.",
        level="basic",
    )
    metadata_file: FilePath | None = option(
        None,
        help="Table of caption_strategy csv or parquet: a .csv, .jsonl or .parquet file. Unset: `metadata` with one of "
        "these extensions in `instance_data_dir`.",
        path="input",
    )
    filename_column: Text = option(
        "file_name",
        help="Column of the table with the images' paths in `instance_data_dir`, with or without their extension "
        "(with it in type csv).",
    )
    caption_column: TextOrList | None = option(
        None,
        takes="text, or list of texts",
        help="Column of the table with the captions; of a list, the first that holds text. Unset: the first of text, "
        "caption and prompt that is there.",
    )
    prompt_embeds_column: Text | None = option(
        None,
        help="Column of the table with the embeddings of the captions, made beforehand: a `.safetensors` file, or a "
        "list with one for each caption; relative paths lead from the table. No text encoder reads these captions. Of "
        "`records`: how the names of such columns begin, which end as those of the instructions do: `NAME_en`, "
        "`NAME_cn`, and for inverse instructions `NAME_en_inv`.",
    )
    dropped_prompt_embeds_column: Text | None = option(
        None,
        help="With `prompt_embeds_column`: column of the table with the file that stands for the dropped caption of "
        "an image. Unset, or where a row names none: the family's dropped caption is encoded. Of `records`, that of "
        "inverse instructions ends in `_inv`.",
    )
    caption_shuffle: Shuffle = option(
        None,
        help="Further variants of each caption with its tags in another order: `enable`, `count` (1), `split_on` "
        "(comma, space, period), `position_start` (tags that stay), `keep_separator` (a text such as `|||`: tags "
        "before it stay, and those after a second one), `dropout` (probability of each other tag to be left "
        "away), `seed`, `include_original`.",
    )
    caption_openers: TextOrList | None = option(
        None,
        takes="text, or list of texts",
        help="Words that captions begin with, such as `The image shows `: half of the time a caption is trained "
        "without the first of these that it has, wherever that stands. Of records, those of rows without references.",
    )
    instance_prompt: TextOrList | None = option(
        None, takes="text, or list of texts", help="Caption of all images, or a list to sample from.", level="basic"
    )
    prepend_instance_prompt: Bool = option(False, help="Put `instance_prompt` in front of each caption.")
    only_instance_prompt: Bool = option(False, help="Use `instance_prompt` in place of each caption.")
    disable_multiline_split: Bool = option(
        False, help="A text file is one caption; otherwise each of its lines is a variant."
    )
    metadata_backend: MetadataBackend = option(
        "discovery",
        help="How sizes and captions are found: by reading the images (`json` is an old name for it, and so is "
        "`huggingface` in datasets of that type).",
        planned_values=dict.fromkeys(("parquet", "webshart"), SIZES_MEASURED),
    )
    repeats: Int = option(
        0,
        help="Extra passes over the images in each epoch: 0 shows each once, 1 twice.",
        ge=0,
        le=10**9,
        level="basic",
    )
    with_replacement: Bool = option(
        False,
        help="Draw each image of a batch by itself: one may come twice in a pass and another not at all, and all "
        "batches are full. Otherwise each image comes once in a pass.",
    )
    is_regularisation_data: Bool = option(
        False,
        help="Prior preservation: the target is the base model's own prediction. Needs an adapter. "
        "`is_regularization_data` is read too.",
    )
    skip_file_discovery: Words = option(
        (),
        takes="vae, aspect, metadata, text: some of them, with commas",
        help="`aspect` or `metadata`: do not scan the folder; the result of the last scan is used, and a file that has "
        "changed since is noticed when it is read. A folder that was never scanned is. `vae` and `text` change "
        "nothing: caches are asked by key.",
    )
    max_num_samples: Int | None = option(
        None, help="Use only so many images, chosen by seed and content.", unit="images", ge=1
    )
    probability: Float = option(
        1.0,
        help="How much of the dataset one epoch takes: 0.5 half of it and the other half in the next epoch, 2 all of "
        "it twice. It multiplies `repeats` + 1.",
        ge=0,
        le=1000,
    )
    start_epoch: Int = option(1, help="First epoch of the dataset; 0 and 1 are the beginning.", ge=0)
    start_step: Int = option(
        0, help="First optimizer step of the dataset; 0 and 1 are the beginning.", unit="optimizer steps", ge=0
    )
    end_epoch: Int | None = option(None, help="Last epoch of the dataset; 0 is no end.", ge=0)
    end_step: Int | None = option(
        None, help="Last optimizer step of the dataset; 0 is no end.", unit="optimizer steps", ge=0
    )
    minimum_aspect_ratio: Float | None = option(None, help="Leave out images whose width / height is smaller.", gt=0)
    maximum_aspect_ratio: Float | None = option(None, help="Leave out images whose width / height is larger.", gt=0)
    max_upscale_threshold: Float | None = option(None, help="As in `config.json`, for this dataset.", ge=0)
    train_batch_size: Int | None = option(
        None, help="As in `config.json`, for this dataset.", unit="images", ge=1, le=4096
    )
    text_embeds: Text | None = option(
        None, help="Id of the text_embeds entry. All captions are kept in one, so it can only be the default one."
    )
    vae_cache_clear_each_epoch: Bool | None = option(None, help="As in `config.json`, for this dataset.")
    vae_cache_ondemand: Bool | None = option(None, help="As in `config.json`, for this dataset.")
    vae_cache_disable: Bool | None = option(None, help="As in `config.json`, for this dataset.")
    hash_filenames: Bool = option(
        True, help="Name cache files by hash.", planned="cache entries are named by content", neutral=(False,)
    )
    preserve_data_backend_cache: Bool = option(
        False, help="Keep the list of files.", planned="the index is always kept and refreshed", neutral=(True,)
    )
    conditioning: Any = option(
        None,
        help="Conditioning that is made from the images.",
        planned="nothing is made from images: make the images, and name their entry in conditioning_data",
    )
    conditioning_data: TextOrList | None = option(
        None,
        takes="id, or list of ids",
        help="Id of the conditioning dataset with the masks or reference images of these images, or a list of ids: "
        "one of masks, and one for each reference that an image has, in order.",
    )
    slider_strength: Float | None = option(None, help="Slider training.", planned="slider training is not built")
    timestep_sampling_offset: Float | None = option(
        None,
        help="Noise levels of this dataset, moved.",
        planned="noise levels are chosen for all datasets: timestep_bias_strategy",
        neutral=(0.0,),
    )
    video: Any = option(None, help="Video settings.", planned="only images are built")
    audio: Any = option(None, help="Audio settings.", planned="only images are built")
    grounding: Any = option(None, help="Grounding boxes.", planned="grounding is not built")

    @property
    def images_folder(self) -> Path | None:
        """The folder whose images are all used; None where they are named elsewhere, or are no files."""
        return None if self.type == "records" else self.instance_data_dir

    @property
    def has_caption_table(self) -> bool:
        """Whether captions come from a table beside the images; other types have them in their own rows."""
        return self.type == "local" and self.caption_strategy in TABLE_STRATEGIES


class EvalDataset(ImageDataset):
    """Images that are never trained on; the eval loss is computed on them."""

    dataset_type: Literal["eval"] = option("eval", help="What the entry is for.", level="basic")  # type: ignore[assignment]


class ConditioningDataset(DatasetEntry):
    """Images that say something of the images of another entry: where the loss counts, or what is to be changed."""

    dataset_type: Literal["conditioning"] = option("conditioning", help="What the entry is for.", level="basic")
    instance_data_dir: FilePath = option(
        REQUIRED,
        help="Folder with the masks or references, each at the relative path of its image (the extension may differ).",
        level="basic",
        path="input",
    )
    conditioning_type: ConditioningType = option(
        REQUIRED,
        help="`mask`: the loss counts where it is white, by brightness. `segmentation`: wherever it is not black. "
        "`reference_strict`: what the model sees beside the caption, cropped exactly like its image. "
        "`reference_loose`: the same, in its own shape.",
        planned_values={"controlnet": "no supported family takes control images"},
        level="basic",
    )
    follow_outside_links: Bool = option(False, help="Follow links that lead out of `instance_data_dir`.")
    source_dataset_id: Text | None = option(
        None, help="Id of the dataset whose masks or references these are, in place of its `conditioning_data`."
    )
    resolution: Float | None = option(
        None,
        help="Of `reference_loose`: larger references are reduced to this; none is enlarged. Unset: that of the "
        "images.",
        gt=0,
    )
    resolution_type: ResolutionType | None = option(
        None, help="Of `reference_loose`: what `resolution` measures. Unset: that of the images."
    )
    maximum_side: Int | None = option(
        None, help="Of `reference_loose`: references with a longer side are reduced to this.", unit="pixels", ge=64
    )
    cache_dir_vae: FilePath | None = option(
        None, help="Of references: folder of their latents. Unset: a folder in `cache_dir`.", path="output"
    )

    @property
    def is_mask(self) -> bool:
        """Whether it says where the loss counts."""
        return self.conditioning_type in MASK_TYPES

    @property
    def is_reference(self) -> bool:
        """Whether the model sees the images."""
        return self.conditioning_type in REFERENCE_TYPES


class TextEmbedsDataset(DatasetEntry):
    """Where encoded captions are kept. Families whose denoiser reads tokens (OmniGen) keep nothing there."""

    dataset_type: Literal["text_embeds"] = option("text_embeds", help="What the entry is for.", level="basic")
    default: Bool = option(False, help="The cache of all datasets that name no other.")
    cache_dir: FilePath | None = option(
        None, help="Folder of the cache. Unset: a folder in `cache_dir`.", path="output"
    )
    write_batch_size: Int | None = option(None, help="As in `config.json`, for this cache.", unit="captions", ge=1)
    caption_filter_list: TextOrList | None = option(
        None,
        takes="list of texts, or path",
        help="Edits of all captions, in order: a regular expression is removed, `s/expression/replacement/` replaces. "
        "A list, or the path of a .txt or .json file.",
    )
    preserve_data_backend_cache: Bool = option(
        False, help="Keep the list of files.", planned="the cache is always kept", neutral=(True,)
    )
    skip_file_discovery: Text = option("", help="Steps to leave out.", planned="nothing needs to be left out")
    instance_data_dir: Text = option("", help="Not used by caches.", planned="a cache has no images")


Dataset = ImageDataset | EvalDataset | ConditioningDataset | TextEmbedsDataset

DATASET_CLASSES: Mapping[str, type[DatasetEntry]] = {
    "image": ImageDataset,
    "eval": EvalDataset,
    "conditioning": ConditioningDataset,
    "text_embeds": TextEmbedsDataset,
}
PLANNED_DATASET_TYPES: Mapping[str, str] = {
    "video": "only images are built",
    "audio": "only images are built",
    "image_embeds": "latents are cached without an entry of their own; remove it",
    "conditioning_image_embeds": "latents of references are cached without an entry of their own; remove it",
    "distillation_cache": "distillation is not built",
    "caption": "captions without images are not built",
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

# The extension of a table decides how it is read, whichever of the strategies names it.
TABLE_STRATEGIES = ("csv", "parquet")
TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")

FROM_CONFIG = (
    *("resolution", "resolution_type", "minimum_image_size", "maximum_image_size", "target_downsample_size"),
    *("caption_strategy", "instance_prompt", "max_upscale_threshold"),
    *("vae_cache_ondemand", "vae_cache_disable", "vae_cache_clear_each_epoch"),
)


@functools.cache
def dataset_options(dataset_type: str) -> Mapping[str, OptionInfo]:
    """Every declared key of a kind of dataset."""
    cls = DATASET_CLASSES[dataset_type]
    return {name: describe_field(name, info, dataset_type) for name, info in cls.model_fields.items()}


def dataset_types() -> tuple[str, ...]:
    """The kinds of dataset that are built."""
    return tuple(DATASET_CLASSES)


def with_defaults(entry: Dataset, config: TrainConfig) -> Dataset:
    """The entry with what it leaves out taken from `config`; entries without images come back unchanged.

    Sizes of an entry and of `config.json` are only comparable in the same unit: an entry that sets its own
    `resolution_type` takes no sizes from `config.json` unless that has the same type.
    """
    if not isinstance(entry, ImageDataset):
        return entry
    same_unit = entry.resolution_type in (None, config.data.resolution_type)
    sizes = ("resolution", "minimum_image_size", "maximum_image_size", "target_downsample_size")
    updates = {
        name: config.value(name)
        for name in FROM_CONFIG
        if getattr(entry, name) is None and (same_unit or name not in sizes)
    }
    # A row's own caption stands nearer than a strategy for datasets in general, but for one that needs no source.
    if entry.type in TABLE_TYPES and updates.get("caption_strategy") != "instanceprompt":
        updates["caption_strategy"] = entry.caption_strategy or entry.type
    # `false` in an entry is no shuffling, whatever config.json says; an eval loss compares the same captions.
    says = "caption_shuffle" in entry.model_fields_set or isinstance(entry, EvalDataset)
    if config.data.caption_shuffle and not says:
        updates["caption_shuffle"] = TagShuffle()
    return entry.model_copy(update=updates)


def conditioning_for(entry: ImageDataset, entries: Sequence[object]) -> list[ConditioningDataset]:
    """The conditioning entries of a dataset: those it names, in its order, then those that name it."""
    there = [each for each in entries if isinstance(each, ConditioningDataset)]
    named = [each for name in entry.conditioning_data or () for each in there if each.id == name]
    return named + [each for each in there if each.source_dataset_id == entry.id and each not in named]


def masks_for(entry: ImageDataset, entries: Sequence[object]) -> list[ConditioningDataset]:
    """The conditioning entries that say where the loss on a dataset counts."""
    return [each for each in conditioning_for(entry, entries) if each.is_mask]


def references_for(entry: ImageDataset, entries: Sequence[object]) -> list[ConditioningDataset]:
    """The conditioning entries with the references of a dataset: the first reference of an image, the second, ..."""
    return [each for each in conditioning_for(entry, entries) if each.is_reference]


def table_path(entry: ImageDataset) -> Path | None:
    """The caption table of an entry: the one it names, or the one of its strategy in its folder; None without one."""
    if entry.metadata_file is not None:
        return entry.metadata_file
    suffixes = sorted(TABLE_SUFFIXES, key=lambda suffix: suffix != f".{entry.caption_strategy}")
    beside = [entry.instance_data_dir / f"metadata{suffix}" for suffix in suffixes if entry.instance_data_dir]
    return next((path for path in beside if path.is_file()), None)


def text_cache_entry(entries: Sequence[object]) -> TextEmbedsDataset | None:
    """The text_embeds entry that counts: the default one, or the only one."""
    texts = [each for each in entries if isinstance(each, TextEmbedsDataset)]
    return next((each for each in texts if each.default), texts[0] if len(texts) == 1 else None)


def filters_for(entries: Sequence[object]) -> tuple[str, ...]:
    """The caption filters of a run."""
    chosen = text_cache_entry(entries)
    filters = chosen.caption_filter_list if chosen else None
    return filters or ()
