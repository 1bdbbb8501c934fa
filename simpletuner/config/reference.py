"""What `simpletuner options` prints, and the generated page `documentation/OPTIONS.md`: all from the declarations."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from simpletuner.config.checking import show_value
from simpletuner.config.datasets import KEY_ALIASES, dataset_options, dataset_types
from simpletuner.config.foreign_keys import RENAMED, RETIRED, UNBUILT
from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import OptionInfo, all_options
from simpletuner.config.schema import config_schema, datasets_schema
from simpletuner.errors import ConfigError, Problem
from simpletuner.spelling import did_you_mean

WIDTH = 100


def run_options_command(
    key: str | None = None,
    search: str | None = None,
    json_schema: bool = False,
    resolved: LoadedRun | None = None,
) -> str:
    """The text that `simpletuner options` prints; without arguments, the list of all options.

    Raises:
        ConfigError: an option of that name does not exist.
    """
    if resolved is not None:
        return resolved_text(resolved)
    if json_schema:
        return schema_text("multidatabackend" if key and key.startswith("multidatabackend") else "config")
    if search is not None:
        return search_text(search)
    return describe(key) if key else overview()


def schema_text(name: str) -> str:
    """JSON Schema of `config` (config.json) or `multidatabackend` (multidatabackend.json)."""
    schema = datasets_schema() if name == "multidatabackend" else config_schema()
    return json.dumps(schema, indent=2, ensure_ascii=False)


def describe(key: str) -> str:
    """Everything that is known of one option, or of a key of dataset entries.

    Raises:
        ConfigError: unknown name; suggests the nearest.
    """
    name = key.lstrip("-").replace("-", "_")
    if name in RENAMED:
        return f"{name} is now called {RENAMED[name]}.\n\n{describe(RENAMED[name])}"
    if name in RETIRED:
        return f"{name} has no effect: {RETIRED[name]}."
    if name in UNBUILT:
        return f"{name} is refused where it acts: {UNBUILT[name].reason} ({UNBUILT[name].fix or 'remove the key'})."
    name = KEY_ALIASES.get(name, name)
    infos, entries = all_options(), dataset_keys()
    if name not in infos and name in entries:
        return "\n".join(_describe(entries[name], "key of an entry of multidatabackend.json"))
    if name not in infos:
        known = [*infos, *entries, *RENAMED, *RETIRED, *UNBUILT]
        fix = did_you_mean(name, known) or "`simpletuner options --search WORD` finds options"
        raise ConfigError(Problem("there is no option of this name", key=name, fix=fix))
    lines = _describe(infos[name], infos[name].group)
    if name in entries:
        lines += ["", *_describe(entries[name], "in an entry of multidatabackend.json")]
    return "\n".join(lines)


def dataset_keys() -> dict[str, OptionInfo]:
    """Every key of dataset entries; where two kinds have it, as images have it."""
    kinds = [dataset_options(kind) for kind in reversed(dataset_types())]
    return {name: info for options in kinds for name, info in options.items()}


def _describe(info: OptionInfo, place: str) -> list[str]:
    lines = [f"{info.name} ({place})", *textwrap.wrap(info.help, WIDTH), ""]
    facts = {
        "default": "none, it must be set" if info.is_required else shown_default(info),
        "allowed": info.allowed,
        "unit": info.unit,
        "old names": ", ".join(old for old, new in RENAMED.items() if new == info.name),
        "not built": info.planned or planned_values_text(info),
    }
    for title, fact in facts.items():
        if fact:
            lines += textwrap.wrap(
                fact, WIDTH, initial_indent=f"  {title:<10} ", subsequent_indent=" " * 13, break_on_hyphens=False
            )
    return lines


def planned_values_text(info: OptionInfo) -> str:
    """Values that are known and not built, grouped by reason."""
    reasons = dict.fromkeys(info.planned_values.values())
    groups = [(why, [value for value, other in info.planned_values.items() if other == why]) for why in reasons]
    return "; ".join(f"{', '.join(values)} ({why})" for why, values in groups)


def search_text(word: str) -> str:
    """One line for each option, and each key of dataset entries, whose name or help mentions the word."""
    folded = word.lower()

    def found(infos: Iterable[OptionInfo]) -> list[OptionInfo]:
        return [info for info in infos if folded in f"{info.name} {info.help}".lower()]

    options, entries = found(all_options().values()), found(dataset_keys().values())
    parts = [_table(options)] if options else []
    parts += [f"in entries of multidatabackend.json\n{_table(entries)}"] if entries else []
    return "\n\n".join(parts) or f'no option mentions "{word}"'


def overview() -> str:
    """One line for each option that is built, by group."""
    infos = [info for info in all_options().values() if not info.planned]
    groups = dict.fromkeys(info.group for info in infos)
    parts = [f"{group}\n{_table([info for info in infos if info.group == group])}" for group in groups]
    return "\n\n".join([*parts, "`simpletuner options KEY` explains one of them."])


def _table(infos: list[OptionInfo]) -> str:
    width = max(len(info.name) for info in infos)
    lines = []
    for info in infos:
        text = f"not built: {info.planned}" if info.planned else info.help
        lines.append(f"  {info.name:<{width}}  {textwrap.shorten(text, WIDTH - width, placeholder=' ...')}")
    return "\n".join(lines)


def resolved_text(run: LoadedRun) -> str:
    """Every option with its value: first the defaults, then, where a terminal still shows it, what was set and where;
    then the datasets.
    """
    values = {name: _shown_value(value) for name, value in run.resolved().items()}
    defaults = [name for name in all_options() if run.origin(name).kind == "default"]
    chosen = [name for name in all_options() if run.origin(name).kind != "default"]
    lines = ["default:", *_columns([(name, values[name]) for name in defaults])]
    lines += ["", "set:", *_columns([(name, values[name], str(run.origin(name))) for name in chosen])]
    lines += ["", f"datasets of {run.data_file}:"]
    lines += [f"  {entry.id}: {entry.dataset_type}" for entry in run.datasets] or ["  none"]
    return "\n".join([*lines, *(["", *(f"note: {line}" for line in run.warnings)] if run.warnings else [])])


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows as aligned lines; a long value moves only what stands behind it."""
    widths = [min(60, max(map(len, column))) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _shown_value(value: Any) -> str:
    return "-" if value is None else show_value(value)


def shown_default(info: OptionInfo) -> str:
    """A default as it would stand in a file; words for "unset"."""
    if info.default is None:
        return "unset"
    return ", ".join(info.default) if isinstance(info.default, tuple) else _plain(info.default) or '""'


def _plain(value: Any) -> str:
    return show_value(value) if isinstance(value, bool | int | float) else str(value)


def option_rows(infos: Iterable[OptionInfo]) -> list[str]:
    """Rows of a Markdown table: key, type or choices, default, unit, meaning."""
    rows = ["| key | type | default | unit | meaning |", "|---|---|---|---|---|"]
    for info in infos:
        default = "**required**" if info.is_required else f"`{shown_default(info)}`"
        kind = info.allowed.replace("|", "\\|")
        meaning = info.help.replace("|", "\\|")
        if info.planned:
            meaning += f" **Not built:** {info.planned}."
        rows.append(f"| `{info.name}` | {kind} | {default} | {info.unit or ''} | {meaning} |")
    return rows
