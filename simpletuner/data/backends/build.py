"""From the keys of a dataset entry to the place where its images are."""

from __future__ import annotations

from pathlib import Path

from simpletuner.config.datasets import ImageDataset
from simpletuner.config.sources import SOURCE_RULES
from simpletuner.data.backends.base import Backend
from simpletuner.data.backends.local import LocalBackend


def source_key(entry: ImageDataset) -> str:
    """The key that says where the images are."""
    return SOURCE_RULES[entry.type].place


def open_backend(entry: ImageDataset, data_file: str | None) -> Backend:
    """The backend of an entry whose keys have been checked and whose defaults are filled in.

    Raises:
        ConfigError: there is nothing of that name, or a package is missing.
        DataError: it cannot be reached, or is damaged.
    """
    if entry.type == "aws":
        return _s3(entry, data_file)
    if entry.type == "huggingface":
        return _parquet(entry, data_file)
    if entry.type == "csv":
        return _csv(entry, data_file)
    assert entry.instance_data_dir is not None
    return LocalBackend(entry.instance_data_dir, entry.follow_outside_links)


def _s3(entry: ImageDataset, data_file: str | None) -> Backend:
    from simpletuner.data.backends.s3 import Bucket, S3Backend

    assert entry.aws_bucket_name is not None
    bucket = Bucket(
        name=entry.aws_bucket_name,
        prefix=entry.aws_data_prefix.strip("/"),
        endpoint_url=entry.aws_endpoint_url,
        region=entry.aws_region_name,
        access_key_id=entry.aws_access_key_id,
        secret_access_key=entry.aws_secret_access_key,
    )
    return S3Backend(bucket, entry.id, data_file)


def _parquet(entry: ImageDataset, data_file: str | None) -> Backend:
    from simpletuner.data.backends.hub import HubDataset, find_tables
    from simpletuner.data.backends.parquet import ParquetBackend, ParquetTable

    assert entry.dataset_name is not None
    asked = (entry.dataset_name, entry.dataset_config, entry.split, entry.revision)
    table = ParquetTable(
        files=find_tables(HubDataset(*asked, entry.id, data_file)),
        image_column=entry.image_column,
        caption_columns=entry.caption_column,
        location=entry.dataset_name,
        identity=" ".join(str(part) for part in asked),
        has_captions=_takes_captions(entry),
    )
    return ParquetBackend(table, entry.id, data_file)


def _csv(entry: ImageDataset, data_file: str | None) -> Backend:
    from simpletuner.data.backends.csv_table import CsvBackend

    assert entry.csv_file is not None
    table = Path(entry.csv_file)
    root = Path(entry.instance_data_dir or table.parent)
    caption_column = entry.csv_caption_column if _takes_captions(entry) else None
    return CsvBackend(
        table, root, entry.filename_column, caption_column, entry.id, data_file, entry.follow_outside_links
    )


def _takes_captions(entry: ImageDataset) -> bool:
    """Whether the captions of a table's rows are asked for."""
    return entry.caption_strategy == entry.type and not entry.only_instance_prompt
