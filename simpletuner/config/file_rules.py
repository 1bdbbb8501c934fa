"""Rules that look at the file system: folders that must exist, and the folder that the run writes to."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from simpletuner.config.draft import Draft
from simpletuner.errors import Problem


def dataset_folders_exist(draft: Draft) -> Iterator[Problem]:
    for entry in draft.pictures:
        folder = entry.instance_data_dir
        if folder.is_dir():
            continue
        origin = draft.datasets.place(entry.id, "instance_data_dir")
        if folder.exists():
            yield origin.problem(f'"{folder}" is not a folder', key=f"{entry.id}.instance_data_dir")
        else:
            written = Path(entry.instance_data_dir)
            relative = written.relative_to(draft.folders.working_dir) if _inside(written, draft) else written
            yield draft.folders.missing(relative, f"{entry.id}.instance_data_dir", origin, "folder")


def _inside(path: Path, draft: Draft) -> bool:
    return path.is_relative_to(draft.folders.working_dir)


def output_folder_is_not_among_the_pictures(draft: Draft) -> Iterator[Problem]:
    output = draft.config.output_dir
    for entry in draft.pictures:
        if output.is_relative_to(entry.instance_data_dir):
            message = (
                f'"{output}" lies in the pictures of dataset "{entry.id}", which would then train on its own output'
            )
            yield draft.problem(message, "output_dir", f"a folder outside of {entry.instance_data_dir}")


def output_folder_can_be_written(draft: Draft) -> Iterator[Problem]:
    output = draft.config.output_dir
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
    name = draft.config.resume_from_checkpoint.strip()
    if not draft.config.resumes or name == "latest":
        return
    places = list(dict.fromkeys([draft.config.output_dir / Path(name).name, draft.folders.working_dir / name]))
    if not any(place.is_dir() for place in places):
        message = f'"{name}": there is no checkpoint of this name'
        allowed = f"latest, none, or a folder at {' or '.join(str(place) for place in places)}"
        yield draft.problem(message, "resume_from_checkpoint", allowed)


FILE_RULES = (
    dataset_folders_exist,
    output_folder_is_not_among_the_pictures,
    output_folder_can_be_written,
    named_checkpoint_exists,
)


def broken_file_rules(draft: Draft) -> list[Problem]:
    """The problems of all rules about files, but for options whose value was refused already."""
    problems = [problem for rule in FILE_RULES for problem in rule(draft)]
    return [problem for problem in problems if problem.key not in draft.faulty]
