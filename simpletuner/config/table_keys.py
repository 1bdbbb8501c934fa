"""The `parquet` object of older data files, read as the keys of their own that its parts are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PRESENT = {"path": "metadata_file", "filename_column": "filename_column", "caption_column": "caption_column"}
_FALLBACK = "fallback_caption_column"
_WITHOUT_USE = {
    "width_column": "pictures are measured",
    "height_column": "pictures are measured",
    "identifier_includes_extension": "names are found with and without their extension",
}


def with_table_keys(raw: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """An entry without its `parquet` object.

    Returns:
        the entry, and what of the object has no effect. Parts that are not known stay keys of the entry, where they are
        refused by name.
    """
    table = raw.get("parquet")
    if not isinstance(table, dict):
        return raw, []
    settings = {key: value for key, value in raw.items() if key != "parquet"}
    notes = [f"parquet.{key} has no effect: {_WITHOUT_USE[key]}" for key in table if key in _WITHOUT_USE]
    if settings.get("metadata_backend") == "parquet":
        settings["metadata_backend"] = "discovery"
        notes.append("metadata_backend parquet is read as discovery: pictures are measured")
    for key, value in table.items():
        if key not in _WITHOUT_USE and key != _FALLBACK:
            settings[_PRESENT.get(key, f"parquet.{key}")] = value
    if table.get(_FALLBACK):
        settings["caption_column"] = [table.get("caption_column", "text"), table[_FALLBACK]]
    return settings, notes
