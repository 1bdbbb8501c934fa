"""Folders of small images for the tests of this package."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from simpletuner.config.datasets import Dataset, with_defaults
from simpletuner.config.options import TrainConfig
from simpletuner.data import datasets
from simpletuner.data.dataset import Dataset as BuiltDataset
from simpletuner.families.spec import FamilySpec
from tests.configs import config_of


def write_image(path: Path, width: int = 64, height: int = 64, seed: int = 0) -> Path:
    """An image of noise; equal arguments give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(values).save(path)
    return path


def tree_digest(root: Path) -> str:
    """Digest of every path, content and time of last change below `root`."""
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and status.st_mode & 0o400 else b""
        digest.update(repr((str(path), status.st_mtime_ns, status.st_mode, content)).encode())
    return digest.hexdigest()


def options(**changes) -> TrainConfig:
    """The options of config.json that datasets read."""
    defaults = {
        "seed": 42,
        "aspect_bucket_rounding": 2,
        "aspect_bucket_alignment": None,
        "resolution": 64.0,
        "resolution_type": "pixel_area",
        "minimum_image_size": None,
        "maximum_image_size": None,
        "target_downsample_size": None,
        "caption_strategy": "filename",
        "instance_prompt": None,
        "max_upscale_threshold": None,
        "caption_shuffle": False,
        "data_backend_sampling": "auto-weighting",
        "vae_cache_ondemand": False,
        "vae_cache_disable": False,
        "vae_cache_clear_each_epoch": False,
        "masked_loss_probability": 1.0,
    }
    return config_of(**(defaults | changes))


def build_datasets(
    entries: Sequence[Dataset], config: TrainConfig, spec: FamilySpec, work_dir: Path, data_file: str | None = None
) -> list[BuiltDataset]:
    """The datasets of entries that no file was read for: these get what the configuration says of all of them here."""
    whole = [with_defaults(entry, config) for entry in entries]
    return datasets.build_datasets(whole, config, spec, work_dir, data_file=data_file)
