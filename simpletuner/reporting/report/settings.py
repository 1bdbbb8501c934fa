"""What the run was made of: each option with its value and its origin, versions, digests."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

from simpletuner.config.options import all_options
from simpletuner.reporting.report.record import RunRecord

DIGEST_DIGITS = 16


def options_of(run: RunRecord) -> dict[str, Any]:
    """What somebody set, and what kept its default: rows of (name, value, origin)."""
    config = run.lock.get("config") or run.start.get("options") or {}
    if not config:
        return {}
    known = all_options()
    order = [name for name in known if name in config] + [name for name in config if name not in known]
    origins = {name: str(origin) for name, origin in (run.lock.get("origins") or {}).items()}
    if not origins:  # an older run did not keep them: what differs from the defaults was set by somebody
        origins = {name: "" for name in order if name not in known or config[name] != _as_json(known[name].default)}
    shown, files = _short_origins(origins)
    return {
        "given": [(name, _value(config[name]), shown[name]) for name in order if name in origins],
        "defaults": [(name, _value(config[name]), "default") for name in order if name not in origins],
        "files": files,
    }


def _short_origins(origins: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Origins with a file's name in place of its path, and name -> path; two files of one name keep their paths."""
    paths: dict[str, set[str]] = {}
    for origin in origins.values():
        path, _, line = origin.rpartition(":")
        if "/" in path and line.isdecimal():
            paths.setdefault(PurePath(path).name, set()).add(path)
    files = {name: next(iter(found)) for name, found in paths.items() if len(found) == 1}
    names = {path: name for name, path in files.items()}
    shown = {}
    for key, origin in origins.items():
        path, _, line = origin.rpartition(":")
        shown[key] = f"{names[path]}, line {line}" if path in names else origin
    return shown, files


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return ", ".join(value)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return json.dumps(value, ensure_ascii=False)


def versions_of(run: RunRecord) -> list[tuple[str, dict[str, str]]]:
    """Packages, and the digests that say whether a file is still the one that was used: (title, name -> text)."""
    lock = run.lock
    if not lock:
        return []
    packages = {"simpletuner": lock.get("simpletuner"), "python": lock.get("python"), **_object(lock.get("packages"))}
    base = _object(lock.get("base"))
    data = {
        name: f"{_object(each).get('pictures', '?')} images, {_short(_object(each).get('fingerprint'))}"
        for name, each in _object(lock.get("data")).items()
    }
    tables = (
        ("Packages", {name: str(version) for name, version in packages.items()}),
        ("Configuration files", _digests(lock.get("config_files"))),
        ("Data", data),
        (f"Base model: {base.get('model', '')}", _digests(base.get("files"))),
    )
    return [(title, rows) for title, rows in tables if rows]


def _digests(value: Any) -> dict[str, str]:
    return {name: _short(digest) for name, digest in _object(value).items()}


def _short(digest: Any) -> str:
    return str(digest)[:DIGEST_DIGITS]


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
