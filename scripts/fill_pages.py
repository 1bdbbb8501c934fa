"""Fills what pages of the documentation take from the code: tables of keys and optimizers, and whole files.

A page marks such a place with `<!-- table: NAME -->` or `<!-- file: PATH -->` and ends it with `<!-- end -->`. A test
compares, so a page cannot say other than the code does.

    python scripts/fill_pages.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from simpletuner.config.datasets import dataset_options
from simpletuner.config.options import OptionInfo
from simpletuner.config.pages import optimizers_table, options_markdown
from simpletuner.config.reference import option_rows, planned_values_text, schema_text
from simpletuner.config.webhooks import webhook_options
from simpletuner.families.presets import CARDS, presets_of
from simpletuner.families.readers import readers_table
from simpletuner.families.registry import FAMILIES, get_spec

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))  # where a test imports this file

from webhook_schema import event_schema  # noqa: E402

PAGES = ROOT / "documentation"
SCHEMAS = ("config", "multidatabackend")
_MARK = re.compile(r"<!-- (table|file): (\S+) -->\n.*?<!-- end -->", re.DOTALL)
_LANGUAGES = {".py": "python", ".json": "json", ".sh": "bash"}


def fill(text: str) -> str:
    """A page with its marked places filled again; everything else as it is."""
    return _MARK.sub(_filled, text)


def _filled(match: re.Match[str]) -> str:
    kind, name = match.groups()
    content = table(name) if kind == "table" else file_block(name)
    return f"<!-- {kind}: {name} -->\n{content}\n<!-- end -->"


def table(name: str) -> str:
    """Rows for `KIND` (built keys of that dataset type, or `webhook`), `KIND/not-built`, `KIND/values-not-built`,
    `optimizers`, `adapter-readers`, `models` or `presets`."""
    if name == "optimizers":
        return optimizers_table()
    if name == "adapter-readers":
        specs = [get_spec(family) for family in FAMILIES]
        return readers_table((spec.title, spec.readers, spec.keys.joining_forms) for spec in specs)
    if name == "models":
        return models_table()
    if name == "presets":
        return presets_table()
    kind, _, part = name.partition("/")
    infos = list((webhook_options() if kind == "webhook" else dataset_options(kind)).values())
    if part == "values-not-built":
        return values_table([info for info in infos if info.planned_values and not info.planned])
    return "\n".join(option_rows(info for info in infos if bool(info.planned) == (part == "not-built")))


def models_table() -> str:
    """Each family with its page and flavors, and how its first flavor trains on a small and on a middle card."""
    small, middle = CARDS[0], 24
    rows = []
    for family in FAMILIES:
        spec = get_spec(family)
        # A family that is another one with references stands on its page.
        pages = [f"documentation/quickstart/{name.upper()}.md" for name in (family, family.rpartition("_")[0])]
        page = next((each for each in pages if (ROOT / each).is_file()), None)
        title = f"[{spec.title}]({page})" if page else spec.title
        found = presets_of(family, spec.default_flavour)
        ways = [preset.way() if (preset := found.get(card)) else "" for card in (small, middle)]
        rows.append(f"| {title} | {', '.join(spec.flavours)} | {' | '.join(ways)} |")
    head = f"| model | flavors | a LoRA on {small} GB | on {middle} GB |"
    return "\n".join([head, "|---|---|---|---|", *rows])


def presets_table() -> str:
    """What trains on which card: a row for each flavor of other needs."""
    rows = []
    for family in FAMILIES:
        alike: dict[tuple[str, ...], list[str]] = {}
        for flavour in get_spec(family).flavours:
            found = presets_of(family, flavour)
            if found:
                cells = tuple(preset.text() if (preset := found.get(card)) else "" for card in CARDS)
                alike.setdefault(cells, []).append(flavour)
        rows += [
            f"| {get_spec(family).title} {', '.join(names)} | {' | '.join(cells)} |" for cells, names in alike.items()
        ]
    head = f"| model | {' | '.join(f'{card} GB' for card in CARDS)} |"
    return "\n".join([head, "|---" * (len(CARDS) + 1) + "|", *rows])


def values_table(infos: list[OptionInfo]) -> str:
    rows = [f"| `{info.name}` | {planned_values_text(info)} |" for info in infos]
    return "\n".join(["| key | values |", "|---|---|", *rows])


def file_block(path: str) -> str:
    """A file of the repository as a code block."""
    content = (ROOT / path).read_text(encoding="utf-8").rstrip("\n")
    return f"```{_LANGUAGES[Path(path.removesuffix('.example')).suffix]}\n{content}\n```"


def event_schema_text() -> str:
    """`documentation/webhook_events.schema.json`."""
    return json.dumps(event_schema(), indent=2) + "\n"


def main() -> None:
    (PAGES / "OPTIONS.md").write_text(options_markdown(), encoding="utf-8")
    for name in SCHEMAS:
        (ROOT / "config" / "schemas" / f"{name}.schema.json").write_text(schema_text(name) + "\n", encoding="utf-8")
    (PAGES / "webhook_events.schema.json").write_text(event_schema_text(), encoding="utf-8")
    for page in (ROOT / "README.md", *sorted(PAGES.rglob("*.md"))):
        text = page.read_text(encoding="utf-8")
        if fill(text) != text:
            page.write_text(fill(text), encoding="utf-8")
            print(f"filled {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
