"""What is wrong with a model, reported before anything of it is loaded.

A mistake in a path, a part that a folder lacks or a model of another family would otherwise show after minutes.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

from simpletuner.config.paths import SINGLE_FILE, looks_like_path, windows_path_fix
from simpletuner.errors import Problem
from simpletuner.families.registry import all_specs
from simpletuner.families.spec import Component, FamilySpec
from simpletuner.models.components import ENCODERS_KEY, MODEL_KEY, VAE_KEY, ModelSource, model_index, naming
from simpletuner.models.safe_loading import CONVERT, PICKLES
from simpletuner.models.single_file import refused_marks


def check_local_model(source: ModelSource, spec: FamilySpec, file: str | None = None) -> list[Problem]:
    """What is missing in a local model folder, before anything is loaded, or why the model cannot be of this family."""
    if refusal := _refusal(source, spec):
        return [replace(refusal, file=file)]
    if source.file and not spec.reads_single_files:
        message = f"{spec.title} cannot be read from a single file yet"
        return [Problem(message, key=source.file_key, file=file, fix="name a folder in diffusers layout, or a hub id")]
    if source.file and not Path(source.file).is_file():
        return [Problem(f"there is no file {source.file}", key=source.file_key, file=file, fix="correct the path")]
    with naming(source.file_key):
        marks = refused_marks(source.file) if source.file else []
    if marks:
        message = (
            f"{source.file} says by {', '.join(marks)} that its noise levels are those of EDM, which are not supported"
        )
        return [Problem(message, key=source.file_key, file=file, fix="name another model")]
    problems = [problem for part in spec.components if (problem := _unusable_place(source, part)) is not None]
    if not source.is_local:
        return problems + _missing_folder(source, file)
    root = Path(source.model)
    problems += _missing_packages(root, spec, file)
    for component in source.parts(spec):
        if component.role in ("vae", "text_encoder") and source.own_place(component):
            continue
        if not (root / component.name / component.config_file).is_file():
            problems.append(
                Problem(
                    f"the model folder {root} has no {component.name}/{component.config_file}",
                    key=MODEL_KEY,
                    file=file,
                    allowed=f"a diffusers folder with {', '.join(c.name + '/' for c in spec.components)}",
                    fix="complete the folder, or name another model"
                    + (", or set pretrained_vae_model_name_or_path" if component.role == "vae" else ""),
                )
            )
    return problems


def _unusable_place(source: ModelSource, component: Component) -> Problem | None:
    """What is wrong with the path of a part of its own; hub ids are not looked at."""
    own = source.own_place(component)
    if not own or component.role == "denoiser":
        return None
    is_encoder = component.role == "text_encoder"
    key = ENCODERS_KEY if is_encoder else VAE_KEY
    allowed = f"a {SINGLE_FILE} file, a folder with {component.config_file}, or a hub id"
    if source.lacks(component.name):
        if component.is_optional:
            return None
        return Problem(f"nothing works without {component.name}", key=key, allowed=allowed)
    if Path(own).suffix.lower() in PICKLES:
        return Problem(f"{own} is a pickle: {CONVERT}", key=key, allowed=allowed)
    if own.endswith(SINGLE_FILE):
        return None if Path(own).is_file() else Problem(f"there is no file {own}", key=key, fix="correct the path")
    is_folder = Path(own).is_dir() or looks_like_path(own)
    if is_encoder and is_folder and not Path(own, component.config_file).is_file():
        return Problem(f"{own} has no {component.config_file}", key=key, allowed=allowed)
    return None


def _missing_packages(root: Path, spec: FamilySpec, file: str | None) -> list[Problem]:
    """Optional packages without which a tokenizer of a local folder cannot be read."""
    folders = [(root / component.name, component) for component in spec.components]
    return [
        missing_package(component, folder, file)
        for folder, component in folders
        if folder.is_dir() and lacks_package(component, folder)
    ]


def lacks_package(component: Component, folder: Path) -> bool:
    """Whether this tokenizer needs a package that is not installed."""
    is_needed = bool(component.package) and not (folder / "tokenizer.json").is_file()
    return is_needed and importlib.util.find_spec(component.package) is None


def missing_package(component: Component, folder: Path, file: str | None = None) -> Problem:
    """What is said of it."""
    return Problem(
        f"the tokenizer {folder} needs {component.package}, which is not installed",
        key=MODEL_KEY,
        file=file,
        fix=f"pip install {component.package}",
    )


def _refusal(source: ModelSource, spec: FamilySpec) -> Problem | None:
    """Of a model that the family refuses by name; a hub id is known without asking the hub."""
    pipeline = model_index(source).get("_class_name") if source.is_local else None
    names = [source.model, str(pipeline)]
    for refused, reason in spec.refused_models.items():
        if any(name.lower() == refused.lower() for name in names):
            message = f"{source.model} ({refused}) cannot be trained as {spec.title}: {reason}"
            return Problem(message, key=MODEL_KEY, fix="name another model")
    if pipeline is None or spec.has_pipeline(pipeline):
        return None  # and the other families need not be imported
    for other in all_specs()[0]:
        if other.has_pipeline(pipeline) and other.networks != spec.networks:
            message = f"{source.model} is a model of {other.title} ({pipeline}), and model_family is {spec.name}"
            fix = f"set model_family to {other.name}, or name a model of {spec.title}"
            return Problem(message, key=MODEL_KEY, fix=fix)
    return None


def _missing_folder(source: ModelSource, file: str | None) -> list[Problem]:
    """A path that looks like a folder and is not there; hub ids have exactly one slash and no leading dot."""
    if not looks_like_path(source.model):
        return []
    return [
        Problem(
            f"there is no model folder at {source.model}",
            key=MODEL_KEY,
            file=file,
            allowed="a folder in diffusers layout, or a hub id (owner/name)",
            fix=windows_path_fix(source.model) or "correct the path",
        )
    ]
