"""Where the images are listed, and the defaults that dataset entries fall back to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from simpletuner.config.options.declare import OptionGroup, option
from simpletuner.config.values import Bool, FilePath, Float, Int, TextOrList


class DataOptions(OptionGroup):
    """Data"""

    data_backend_config: FilePath | None = option(
        None,
        help="JSON file with the list of datasets. Unset: `multidatabackend.json` beside the configuration file.",
        level="basic",
        path="input",
    )
    resolution: Float = option(
        1024.0,
        help="Size of training images, as `resolution_type` measures it; a dataset entry may say otherwise.",
        unit="pixels, or megapixels for `area`",
        gt=0,
        level="basic",
    )
    resolution_type: Literal["pixel", "area", "pixel_area"] = option(
        "pixel_area",
        help="`pixel`: length of the shorter side. `area`: megapixels. `pixel_area`: side in pixels of a square of "
        "the same area.",
        level="basic",
    )
    minimum_image_size: Float | None = option(
        None, help="Leave out images that are smaller, measured like `resolution`; 0 takes all.", ge=0
    )
    maximum_image_size: Float | None = option(
        None, help="Larger images are first downsampled to `target_downsample_size`.", gt=0
    )
    target_downsample_size: Float | None = option(None, help="See `maximum_image_size`.", gt=0)
    aspect_bucket_rounding: Int = option(
        2, help="Decimal places of the aspect ratio that names a bucket.", unit="decimal places", ge=1, le=9
    )
    aspect_bucket_alignment: Int | None = option(
        None,
        help="Sides of training images are multiples of this. Unset: what the family needs.",
        unit="pixels",
        ge=8,
        le=64,
    )
    caption_strategy: Literal["filename", "textfile", "instanceprompt", "csv", "parquet"] = option(
        "filename",
        help="Where captions come from, for datasets that do not say: the file's name, a text file beside it, "
        "`instance_prompt`, or a table (csv, parquet). Datasets of type csv and huggingface that do not say take them "
        "from their rows.",
    )
    instance_prompt: TextOrList | None = option(
        None,
        takes="text, or list of texts",
        help="Caption of `caption_strategy: instanceprompt`, or a list to sample from, for datasets without their own.",
    )
    cache_dir: FilePath = option(
        Path("cache"), help="Folder of the caches and of the index of each dataset.", path="output"
    )
    vae_batch_size: Int = option(
        4, help="Images that the VAE encodes at once when the cache is filled.", unit="images", ge=1, le=1024
    )
    vae_cache_ondemand: Bool = option(
        False, help="Encode images when training first needs them; start-up is quicker, the VAE stays in memory."
    )
    vae_cache_disable: Bool = option(
        False,
        help="Encode images each time that training needs them and write no latents; the VAE stays in memory.",
    )
    vae_cache_clear_each_epoch: Bool = option(
        False,
        help="Draw the random crops and aspects again in each epoch. They are encoded when training needs them and not "
        "kept; the VAE stays in memory.",
    )
    text_cache_ondemand: Bool = option(
        False,
        help="Encode captions when training first needs them; start-up is quicker, the text encoders stay in memory.",
    )
    text_cache_disable: Bool = option(
        False,
        help="Encode captions each time that training needs them and write nothing; the text encoders stay in memory.",
    )
    write_batch_size: Int = option(
        128, help="Captions or latents that are written to a cache at once.", unit="entries", ge=1
    )
    allow_dataset_oversubscription: Bool | None = option(
        None,
        help="The last batch of a bucket may be short. Unset: it is trained as it is. `true`: it is filled up with "
        "further images of the bucket, which count. `false`: a bucket that cannot fill a single batch is an error, "
        "which says how many `repeats` it needs.",
    )
    disable_bucket_pruning: Bool = option(
        False, help="Keep buckets smaller than a batch.", planned="they are always kept", neutral=(True,)
    )
    data_backend_sampling: Literal["auto-weighting", "uniform"] = option(
        "auto-weighting",
        help="How datasets are mixed: `auto-weighting` in proportion to their size with repeats, so that an epoch "
        "shows every image; `uniform` equally often, whatever their size. Both times `probability`.",
    )
    conditioning_multidataset_sampling: Literal["combined", "random"] = option(
        "combined",
        help="Where a dataset has several sets of reference images: `combined` shows the model one of each, in "
        "order, `random` one of a set that is sampled for each use of an image.",
    )
    max_upscale_threshold: Float | None = option(
        None,
        help="Leave out images that would have to be enlarged more: 0.2 allows sides of up to 1.2 times their "
        "length. Of `crop_aspect` closest and random, only the aspects that need less are chosen from.",
        ge=0,
    )
    caption_shuffle: Bool = option(
        False,
        help="Train a second variant of each caption with its tags (between commas) in another order, in datasets that "
        "do not say otherwise.",
    )
