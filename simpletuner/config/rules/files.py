"""Rules that look at the file system: folders that must exist, and the folder that the run writes to."""

from __future__ import annotations

import glob
import tempfile
from collections.abc import Iterator
from pathlib import Path

from simpletuner.config.datasets import TABLE_SUFFIXES, ConditioningDataset, ImageDataset, references_for, table_path
from simpletuner.config.draft import Draft
from simpletuner.config.nearby import exists
from simpletuner.config.paths import ADAPTER_FILES, PREVIEW_FOLDER, adapter_file_in, adapter_on_hub, looks_like_path
from simpletuner.errors import Problem


def dataset_folders_exist(draft: Draft) -> Iterator[Problem]:
    entries: list[ImageDataset | ConditioningDataset] = [*draft.images, *draft.conditioning]
    for entry in entries:
        folder = entry.instance_data_dir
        if folder is None or folder.is_dir():
            continue
        origin = draft.datasets.place(entry.id, "instance_data_dir")
        if exists(folder):
            yield origin.problem(f'"{folder}" is not a folder', key=f"{entry.id}.instance_data_dir")
        else:
            yield draft.folders.missing(_as_written(folder, draft), f"{entry.id}.instance_data_dir", origin, "folder")


def dataset_tables_exist(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        if entry.csv_file is not None and not entry.csv_file.is_file():
            origin, key = draft.datasets.place(entry.id, "csv_file"), f"{entry.id}.csv_file"
            yield draft.folders.missing(_as_written(entry.csv_file, draft), key, origin, "file")
        if entry.records_file is not None and not exists(entry.records_file):
            origin, key = draft.datasets.place(entry.id, "records_file"), f"{entry.id}.records_file"
            yield draft.folders.missing(_as_written(entry.records_file, draft), key, origin, "file or folder")
        name = entry.dataset_name
        if name is not None and looks_like_path(name) and not exists(Path(name)):
            origin, key = draft.datasets.place(entry.id, "dataset_name"), f"{entry.id}.dataset_name"
            yield draft.folders.missing(Path(name).expanduser(), key, origin, "file or folder")


def _as_written(path: Path, draft: Draft) -> Path:
    """A path that was made absolute, short again where it lies in the working folder."""
    working_dir = draft.folders.working_dir
    return path.relative_to(working_dir) if path.is_relative_to(working_dir) else path


def conditioning_is_not_among_the_images(draft: Draft) -> Iterator[Problem]:
    for each in draft.conditioning:
        folder = each.instance_data_dir
        for entry in draft.images:
            # References of one dataset may well be the images of another: a change learned in both directions.
            is_meant = each.is_reference and each not in references_for(entry, draft.datasets.entries)
            if entry.images_folder and folder.is_relative_to(entry.images_folder) and not is_meant:
                message = f'"{folder}" lies in the images of dataset "{entry.id}", which would train on it'
                allowed = f"a folder outside of {entry.instance_data_dir}"
                yield draft.dataset_problem(each, "instance_data_dir", message, allowed)


def caption_tables_exist(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        if not entry.has_caption_table or not entry.instance_data_dir or not entry.instance_data_dir.is_dir():
            continue
        table = table_path(entry)
        if table is None or not table.is_file():
            names = ", ".join(f"metadata{suffix}" for suffix in TABLE_SUFFIXES)
            message = f'"{table}" is not there' if table else f"is missing, and the folder holds none of {names}"
            yield draft.dataset_problem(entry, "metadata_file", message, "a file .csv, .jsonl or .parquet")
        elif table.suffix.lower() not in TABLE_SUFFIXES:
            message = f'"{table}" has none of the known extensions'
            yield draft.dataset_problem(entry, "metadata_file", message, ", ".join(TABLE_SUFFIXES))


def output_folder_is_not_among_the_images(draft: Draft) -> Iterator[Problem]:
    output = draft.config.checkpoint.output_dir
    for entry in draft.images:
        if entry.images_folder and output.is_relative_to(entry.images_folder):
            message = f'"{output}" lies in the images of dataset "{entry.id}", which would then train on its own output'
            yield draft.problem(message, "output_dir", f"a folder outside of {entry.instance_data_dir}")


def output_folder_can_be_written(draft: Draft) -> Iterator[Problem]:
    output = draft.config.checkpoint.output_dir
    nearest = next(place for place in (output, *output.parents) if place.exists())
    if not nearest.is_dir():
        yield draft.problem(f'"{nearest}" is a file', "output_dir", "a folder, or a name that is free")
        return
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        yield draft.problem(f'"{nearest}" cannot be written: {error.strerror}', "output_dir", "a folder of yours")


def named_checkpoint_exists(draft: Draft) -> Iterator[Problem]:
    name = draft.config.checkpoint.resume_from_checkpoint.strip()
    if not draft.config.checkpoint.resumes or name == "latest":
        return
    here = (
        [draft.config.checkpoint.output_dir / name] if Path(name).name == name else []
    )  # a path means exactly that path
    places = list(dict.fromkeys([*here, draft.folders.working_dir / name]))
    if not any(exists(place) and place.is_dir() for place in places):
        message = f'"{name}": there is no checkpoint of this name'
        allowed = f"latest, none, or a folder at {' or '.join(str(place) for place in places)}"
        # A start from it, or a fresh one, may have moved it there.
        moved = draft.config.checkpoint.output_dir.glob(f"earlier-runs/*/{glob.escape(Path(name).name)}")
        newest = max(moved, key=lambda place: place.parent.stat().st_mtime, default=None)
        fix = f'it was moved: name "{newest}", or "latest" for the run that is in output_dir now' if newest else None
        yield draft.problem(message, "resume_from_checkpoint", allowed, fix)


def adapter_to_start_from_exists(draft: Draft) -> Iterator[Problem]:
    path = draft.config.adapter.init_lora
    if path is not None and not adapter_file_in(path).is_file():
        yield draft.folders.missing(_as_written(path, draft), "init_lora", draft.origin("init_lora"), "file")


def assistant_exists(draft: Draft) -> Iterator[Problem]:
    where, key = draft.config.adapter.assistant_lora_path, "assistant_lora_path"
    if where is None or adapter_file_in(Path(where)).is_file():
        return
    if Path(where).exists():
        allowed = f"a .safetensors file, or a folder with {' or '.join(ADAPTER_FILES)}"
        yield draft.problem(f'"{where}" holds no adapter file', key, allowed, "name the file")
    elif adapter_on_hub(where) is None:
        yield draft.folders.missing(Path(where), key, draft.origin(key), "file")


def previews_have_a_decoder(draft: Draft) -> Iterator[Problem]:
    config, spec = draft.config, draft.spec
    if not config.validation.validation_preview or spec is None or spec.preview_decoder is not None:
        return
    own = Path(config.model.pretrained_model_name_or_path or "") / PREVIEW_FOLDER
    if not (own / "config.json").is_file():
        message = f"there is no tiny autoencoder for {spec.title}"
        yield draft.problem(message, "validation_preview", f"a model folder with {PREVIEW_FOLDER}/", "remove the key")


FILE_RULES = (
    dataset_folders_exist,
    dataset_tables_exist,
    conditioning_is_not_among_the_images,
    caption_tables_exist,
    output_folder_is_not_among_the_images,
    output_folder_can_be_written,
    named_checkpoint_exists,
    adapter_to_start_from_exists,
    assistant_exists,
    previews_have_a_decoder,
)
