"""`multidatabackend.json` -> typed entries, with every fault as a `Problem` that names entry, key and line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from simpletuner.config.checking import check_settings, refuse_planned, show_value
from simpletuner.config.datasets import (
    DATASET_CLASSES,
    KEY_ALIASES,
    MASK_TYPES,
    NO_LONGER_READ,
    PLANNED_DATASET_TYPES,
    REFERENCE_KEYS,
    VALUE_ALIASES,
    Dataset,
    dataset_options,
    with_defaults,
)
from simpletuner.config.foreign_keys import NEVER_DELETED
from simpletuner.config.json_reader import Document
from simpletuner.config.layers import Origin, Setting
from simpletuner.config.merging import unknown_key
from simpletuner.config.options import OptionInfo, TrainConfig
from simpletuner.config.sources import ImageSource, source_faults
from simpletuner.config.table_keys import with_table_keys
from simpletuner.config.values import read_bool
from simpletuner.errors import Problem
from simpletuner.spelling import did_you_mean


@dataclass
class LoadedDatasets:
    """The entries that take part, the lines of their keys, and what was wrong.

    Args:
        warnings: keys that have no effect, one line each.
        is_read: False where the file could not be read, so that nothing can be said of the datasets.
    """

    entries: list[Dataset] = field(default_factory=list)
    origins: dict[tuple[str, str], Origin] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    disabled: list[str] = field(default_factory=list)
    is_read: bool = True

    def place(self, dataset_id: str, key: str) -> Origin:
        """Where a key of an entry stands; for a key that is not written, where the entry stands."""
        return self.origins.get((dataset_id, key)) or self.origins[(dataset_id, "")]


def read_datasets(document: Document, config: TrainConfig) -> LoadedDatasets:
    """Every enabled entry with its defaults filled in; entries at fault are left out and reported."""
    loaded = LoadedDatasets()
    entries = document.value
    if not isinstance(entries, list):
        message = "is not a list of datasets"
        loaded.problems.append(Problem(message, file=document.file, line=1, allowed='[{"id": ..., ...}, ...]'))
        return loaded
    for index, raw in enumerate(entries):
        place = Origin("file", document.file, document.line(index))
        if not isinstance(raw, dict):
            message = f"{show_value(raw)} is not an object"
            loaded.problems.append(place.problem(message, key=_entry_name(index), allowed='{"id": ..., ...}'))
            continue
        _read_entry(raw, index, document, config, loaded)
    return loaded


def _read_entry(
    raw: Mapping[str, Any], index: int, document: Document, config: TrainConfig, loaded: LoadedDatasets
) -> None:
    origin = Origin("file", document.file, document.line(index))
    name = str(raw.get("id") or _entry_name(index))
    raw, notes = with_table_keys(raw)
    loaded.warnings += [f"{origin}: {name}: {note}" for note in notes]
    written = _settings(raw, index, document, name, loaded.problems)
    if _is_disabled(written):
        loaded.disabled.append(name)
        return
    kind = _dataset_type(written, name, loaded.problems)
    if kind is None:
        return
    infos = dataset_options(kind)
    if kind == "conditioning":
        _leave_out_image_keys(written, infos, name, loaded)
    for key in [key for key in written if key in NEVER_DELETED]:
        loaded.warnings.append(f"{written.pop(key).origin}: {name}.{key} has no effect: {NEVER_DELETED[key]}")
    for key in [key for key in written if key not in infos]:
        loaded.problems.append(_unknown_dataset_key(written.pop(key), kind, name))
    entry, problems = check_settings(DATASET_CLASSES[kind], infos, written, origin, f"{name}.")
    if entry is not None:
        problems += refuse_planned(
            dict(entry), infos, lambda key: written[key].origin if key in written else origin, f"{name}."
        )
    if isinstance(entry, ImageSource):
        for fault in source_faults(entry):
            place = written[fault.key].origin if fault.key in written else origin
            problems.append(place.problem(fault.message, f"{name}.{fault.key}", fault.allowed, fault.fix))
    loaded.problems += problems
    if entry is None:
        return
    if any(entry.id == other.id for other in loaded.entries):
        message = f'the id "{entry.id}" is used twice'
        loaded.problems.append(
            written["id"].origin.problem(message, key=f"{name}.id", fix="give each entry its own id")
        )
        return
    loaded.origins[(entry.id, "")] = origin
    loaded.origins.update({(entry.id, key): setting.origin for key, setting in written.items()})
    loaded.entries.append(with_defaults(entry, config))  # type: ignore[arg-type]


def _entry_name(index: int) -> str:
    """What an entry without an id is called, as a reader counts."""
    return f"entry {index + 1}"


def _settings(
    raw: Mapping[str, Any], index: int, document: Document, name: str, problems: list[Problem]
) -> dict[str, Setting]:
    """Keys and values under their present names; unset ones left out."""
    settings: dict[str, Setting] = {}
    for key, value in raw.items():
        present = KEY_ALIASES.get(key, key)
        setting = Setting(present, value, Origin("file", document.file, document.line(index, key)))
        if key in ("comment", "_comment") or value is None or (value == "" and present != "skip_file_discovery"):
            continue
        if present in settings:
            message = f'is given twice, once as "{key}"'
            problems.append(setting.origin.problem(message, key=f"{name}.{present}"))
            continue
        alias = VALUE_ALIASES.get((present, value)) if isinstance(value, str) else None
        settings[present] = replace(setting, value=alias) if alias else setting
    return settings


def _leave_out_image_keys(
    written: dict[str, Setting], infos: Mapping[str, OptionInfo], name: str, loaded: LoadedDatasets
) -> None:
    """Take out what only images have: masks and references have no captions, and masks no latents."""
    kind = written["conditioning_type"].value if "conditioning_type" in written else None
    spare = [
        key
        for key in written
        if (key not in infos and key in dataset_options("image"))
        or (key in REFERENCE_KEYS and kind not in REFERENCE_KEYS[key])
    ]
    if spare:
        place = written[spare[0]].origin
        what = "references have no captions and are cropped as their type says"
        if kind in MASK_TYPES:
            what = "masks are cropped exactly like their images, and have no captions or latents"
        loaded.warnings.append(f"{place}: {name}: without effect: {', '.join(spare)}; {what}")
    for key in spare:
        del written[key]


def _is_disabled(settings: Mapping[str, Setting]) -> bool:
    try:
        return "disabled" in settings and bool(read_bool(settings["disabled"].value))
    except ValueError:
        return False


def _dataset_type(settings: Mapping[str, Setting], name: str, problems: list[Problem]) -> str | None:
    setting = settings.get("dataset_type")
    kind = setting.value if setting else "image"
    if isinstance(kind, str) and kind in DATASET_CLASSES:
        return kind
    assert setting is not None
    reason = PLANNED_DATASET_TYPES.get(str(kind))
    message = (
        f"{show_value(kind)} cannot be used: {reason}" if reason else f"{show_value(kind)} is not a kind of dataset"
    )
    fix = None if reason else did_you_mean(str(kind), DATASET_CLASSES)
    problems.append(
        setting.origin.problem(message, key=f"{name}.dataset_type", allowed=", ".join(DATASET_CLASSES), fix=fix)
    )
    return None


def _unknown_dataset_key(setting: Setting, kind: str, name: str) -> Problem:
    if setting.key in NO_LONGER_READ:
        fix = f'write "{NO_LONGER_READ[setting.key]}"'
        return setting.origin.problem("is no longer read", key=f"{name}.{setting.key}", fix=fix)
    return unknown_key(setting, [*dataset_options(kind), *KEY_ALIASES], f"{name}.", KEY_ALIASES)
