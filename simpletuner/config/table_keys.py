"""The `parquet` and `huggingface` objects of older data files, read as the keys of their own that their parts are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PRESENT: Mapping[str, Mapping[str, str]] = {
    "parquet": {"path": "metadata_file", "filename_column": "filename_column", "caption_column": "caption_column"},
    "huggingface": {"image_column": "image_column", "caption_column": "caption_column"},
}
_FALLBACK = "fallback_caption_column"
_WITHOUT_USE = {
    "width_column": "images are measured",
    "height_column": "images are measured",
    "identifier_includes_extension": "names are found with and without their extension",
}


def with_table_keys(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """An entry without these objects.

    Returns:
        the entry, and what of the objects has no effect. Parts that are not known stay, and are refused by name.
    """
    settings, notes = dict(raw), []
    for name, present in _PRESENT.items():
        table = raw.get(name)
        if not isinstance(table, dict):
            continue
        del settings[name]
        notes += [f"{name}.{key} has no effect: {_WITHOUT_USE[key]}" for key in table if key in _WITHOUT_USE]
        settings |= {present[key]: value for key, value in table.items() if key in present}
        if table.get(_FALLBACK):
            settings["caption_column"] = [table.get("caption_column", "text"), table[_FALLBACK]]
        others = {key: value for key, value in table.items() if key not in {*present, *_WITHOUT_USE, _FALLBACK}}
        if others and name == "huggingface":  # filters of rows, which have their own reason to be refused
            settings[name] = others
        else:
            settings |= {f"{name}.{key}": value for key, value in others.items()}
    if "parquet" not in settings and "parquet" in raw and settings.get("metadata_backend") == "parquet":
        settings["metadata_backend"] = "discovery"
        notes.append("metadata_backend parquet is read as discovery: images are measured")
    return settings, notes
