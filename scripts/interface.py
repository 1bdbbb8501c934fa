"""Prints what users have to spell: options, dataset and webhook keys, old names, commands and flags, variables.

Types and defaults come from the JSON schemas that `simpletuner options` prints, commands and flags from the command
line itself, all else from the tables in the documentation, which tests hold equal to the code. Help texts are not
compared.

    python scripts/interface.py --tree ../older-clone > before.json
    python scripts/interface.py --compare before.json      # exit code 1 and what differs
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from same_results import ROOT, Facts, differences, import_package

# Of a JSON schema: for people, and free to change.
TEXTS = ("description", "title", "$schema")
_NAME = re.compile(r"`([^`]+)`")


def interface_of(tree: Path) -> Facts:
    """All names of the package in `tree`, with types and defaults."""
    pages = tree / "documentation"
    import_package(tree)
    return {
        "options": _without_texts(json.loads(run_command("options", "--json-schema")))["properties"],
        "datasets": dataset_keys(json.loads(run_command("options", "multidatabackend", "--json-schema"))),
        "other keys": other_keys((pages / "OPTIONS.md").read_text(encoding="utf-8")),
        "webhooks": table_keys((pages / "WEBHOOKS.md").read_text(encoding="utf-8")),
        "webhook events": _without_texts(json.loads((pages / "webhook_events.schema.json").read_text())),
        "commands": commands(),
    }


def run_command(*arguments: str) -> str:
    """What `simpletuner ARGUMENTS` prints."""
    shared = import_module("simpletuner.cli")
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        shared.app(list(arguments), standalone_mode=False)
    return printed.getvalue()


def commands() -> Facts:
    """Each command with its arguments and flags: spellings, type, default."""
    from typer.main import get_command

    group: Any = get_command(import_module("simpletuner.cli").app)
    return {name: _parameters(command) for name, command in [("", group), *_all_commands(group)]}


def _all_commands(group: Any, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, command in sorted(getattr(group, "commands", {}).items()):
        found += [(f"{prefix}{name}", command), *_all_commands(command, f"{prefix}{name} ")]
    return found


def _parameters(command: Any) -> Facts:
    return {" ".join([*each.opts, *each.secondary_opts]): _parameter(each) for each in command.params}


def _parameter(parameter: Any) -> Facts:
    annotation = parameter.type_descriptor.annotation
    names = ("required", "default", "multiple", "min", "max", "hidden")
    facts = {name: value for name in names if (value := getattr(parameter, name, None)) not in (None, False)}
    return {"type": getattr(annotation, "__name__", str(annotation))} | {
        name: value if isinstance(value, bool | int | float) else str(value) for name, value in facts.items()
    }


def dataset_keys(schema: Facts) -> Facts:
    """The keys of each kind of dataset."""
    kinds = schema["items"]["anyOf"]
    return {kind["title"]: _without_texts({name: kind[name] for name in ("properties", "required")}) for kind in kinds}


def other_keys(page: str) -> Facts:
    """Variables, renamed, retired and refused keys of the options' page: those are tables of two or three columns."""
    facts: Facts = {}
    heading = ""
    for line in page.splitlines():
        if line.startswith("#"):
            heading = line.strip("# ")
        cells = _cells(line)
        if 2 <= len(cells) <= 3:
            facts |= {f"{heading} > {name}": _plain(cells[1]) for name in _NAME.findall(cells[0])}
    return facts


def table_keys(page: str) -> Facts:
    """Type and default of each key in a page's tables of five columns."""
    rows = [cells for cells in map(_cells, page.splitlines()) if len(cells) == 5]
    return {name: f"{cells[1]}, default {cells[2]}" for cells in rows for name in _NAME.findall(cells[0])}


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split(" | ")] if line.startswith("| `") else []


def _plain(cell: str) -> str:
    """The names in a cell: a key's new name, or the values that are refused; reasons are left out."""
    new_name = re.fullmatch(r"`([^`]+)`", cell)
    if new_name:
        return new_name[1]
    return re.sub(r" \([^()]*(\([^()]*\)[^()]*)*\)", "", cell) if ";" in cell or cell.endswith(")") else ""


def _without_texts(schema: Any, is_names: bool = False) -> Any:
    """A schema without what is for people; the keys of `properties` are names and stay."""
    if isinstance(schema, list):
        return [_without_texts(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: _without_texts(value, key == "properties") for key, value in schema.items() if is_names or key not in TEXTS
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the clone that is described; this one")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="what an earlier call printed")
    given = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        after = interface_of(given.tree.resolve())
    if given.compare is None:
        print(json.dumps(after, indent=1))
        return
    lines = differences(json.loads(given.compare.read_text()), after)
    print(*(lines or ["nothing differs"]), sep="\n")
    raise SystemExit(any(not line.startswith("+ ") for line in lines))


if __name__ == "__main__":
    main()
