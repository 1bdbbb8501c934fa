"""The pages say what the code does: filled places, links, anchors, and what is called not built."""

from __future__ import annotations

import ast
import json
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from scripts.fill_pages import PAGES, ROOT, fill
from simpletuner.cli import app
from simpletuner.config.datasets import PLANNED_DATASET_TYPES, dataset_options, dataset_types
from simpletuner.config.options import OptionInfo, all_options, planned_options
from simpletuner.launch import load_arguments

ALL = [*sorted(PAGES.rglob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
# Where the quickstart that people come from links to.
PROMISED = (
    "OPTIONS.md#environment-configuration-variables",
    "DATALOADER.md#caption_strategy",
    "DREAMBOOTH.md#masked-loss",
    "evaluation/EVAL_LOSS.md",
    "INSTALL.md",
    "TUTORIAL.md",
)
_FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
_NOT_BUILT = re.compile(r"<!-- not built: (.*?) -->")

pages = pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))


def anchor(heading: str) -> str:
    """As GitHub makes them: lower case, blanks to dashes, letters, digits, dashes and underscores kept."""
    plain = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    kept = (char for char in plain if char in " -_" or unicodedata.category(char)[0] in "LN")
    return "".join(kept).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


def leads_somewhere(page: Path, target: str) -> bool:
    name, _, fragment = target.partition("#")
    path = (page.parent / name).resolve() if name else page
    return path.exists() and (not fragment or fragment in anchors(path))


@pytest.mark.parametrize(
    ("heading", "expected"),
    [("caption_strategy", "caption_strategy"), ("5. Use the `adapter`", "5-use-the-adapter"), ("配方", "配方")],
)
def test_anchors_are_those_that_github_makes(heading: str, expected: str):
    assert anchor(heading) == expected


@pages
def test_links_lead_somewhere(page: Path):
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [target for target in _LINK.findall(text) if not re.match(r"[a-z]+:", target)]
    assert [target for target in targets if not leads_somewhere(page, target)] == []


@pytest.mark.parametrize("target", PROMISED)
def test_the_places_that_the_quickstart_links_to_are_there(target: str):
    assert leads_somewhere(PAGES / "any.md", target)


@pages
def test_filled_places_hold_what_the_code_says(page: Path):
    text = page.read_text(encoding="utf-8")
    assert text == fill(text), "write it again: python scripts/fill_pages.py"


def test_every_dataset_key_has_a_row():
    text = (PAGES / "DATALOADER.md").read_text(encoding="utf-8")
    for kind in dataset_types():
        for key in dataset_options(kind):
            assert f"| `{key}` |" in text, f"{key} of {kind}: write it again: python scripts/fill_pages.py"


def is_planned(claim: str) -> bool:
    """Whether `KEY`, `KEY: VALUE`, `dataset: KEY` or `dataset: KEY: VALUE` is declared and not built."""
    if claim.startswith("dataset: dataset_type: "):
        return claim.removeprefix("dataset: dataset_type: ") in PLANNED_DATASET_TYPES
    infos: Mapping[str, OptionInfo] = all_options()
    if claim.startswith("dataset: "):
        claim, infos = claim.removeprefix("dataset: "), dataset_options("image")
    key, _, value = claim.partition(": ")
    return value in infos[key].planned_values if value else infos[key].planned is not None


@pytest.mark.parametrize("page", sorted(PAGES.rglob("*.md")), ids=lambda page: str(page.relative_to(PAGES)))
def test_what_a_page_calls_not_built_is_refused(page: Path):
    claims = [
        claim.strip() for mark in _NOT_BUILT.findall(page.read_text(encoding="utf-8")) for claim in mark.split(";")
    ]
    assert [claim for claim in claims if not is_planned(claim)] == [], "it is built now: correct the page"


def test_claims_are_read_as_they_are_written():
    assert all(is_planned(name) for name in planned_options())
    assert not is_planned("seed")
    assert not is_planned("report_to: tensorboard")
    assert not is_planned("dataset: repeats")
    assert not is_planned("dataset: dataset_type: eval")


def test_both_languages_of_the_quickstart_name_the_same_keys_files_and_gaps():
    english, chinese = ((PAGES / "quickstart" / name).read_text("utf-8") for name in ("OMNIGEN.md", "OMNIGEN.zh.md"))
    assert _NOT_BUILT.findall(english) == _NOT_BUILT.findall(chinese)
    assert re.findall(r"<!-- file: \S+ -->", english) == re.findall(r"<!-- file: \S+ -->", chinese)
    keys = [re.findall(r"^\| `(\w+)`", text, re.MULTILINE) for text in (english, chinese)]
    assert keys[0] == keys[1]


CHINESE = sorted(PAGES.rglob("*.zh.md"))


def shown_blocks(page: Path) -> list[str]:
    """The blocks of a page without comments, blanks at the ends of lines, and the prompts that are in its language."""
    found = []
    for block in _FENCE.findall(page.read_text(encoding="utf-8")):
        block = re.sub(r"\s+(#|//).*", "", block)
        found.append(re.sub(r'(--prompt|--instruction) "[^"]*"', r"\1", block).strip())
    return found


@pytest.mark.parametrize("page", CHINESE, ids=lambda page: page.name)
def test_a_chinese_page_shows_the_commands_and_files_of_the_english_one(page: Path):
    english = page.with_name(page.name.replace(".zh.md", ".md"))
    assert shown_blocks(page) == shown_blocks(english)


VERB = re.compile(r"(?:^|[\s`/])simpletuner ([a-z][a-z-]*)", re.MULTILINE)


def test_commands_that_pages_show_exist():
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    verbs |= {str(group.name) for group in app.registered_groups}
    shown = {
        (page.name, verb)
        for page in ALL
        for block in _FENCE.findall(page.read_text("utf-8"))
        for verb in VERB.findall(block)
    }
    assert {verb for _, verb in shown} >= {"train", "check", "plan", "generate", "export"}
    assert [(page, verb) for page, verb in sorted(shown) if verb not in verbs] == []


def texts_of(module: Path) -> list[str]:
    """The texts in a module's code; docstrings are not messages."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
    return [node.value for node in constants if isinstance(node.value, str)]


@pytest.mark.slow
def test_messages_that_troubleshooting_quotes_are_the_program_s():
    """Quoted in bold, with `...` for what differs from case to case."""
    text = (PAGES / "TROUBLESHOOTING.md").read_text(encoding="utf-8")
    quoted = [message for line in re.findall(r"\*\*(\".*?)\*\*", text) for message in re.findall(r'"([^"]+)"', line)]
    assert len(quoted) > 5
    texts = [text for path in (ROOT / "simpletuner").rglob("*.py") for text in texts_of(path)]
    parts = [part.strip(" .") for message in quoted for part in message.split("...") if part.strip(" .")]
    assert [part for part in parts if not any(part in text for text in texts)] == []


def test_the_worked_example_is_short():
    files = [ROOT / "simpletuner/models/auraflow" / name for name in ("spec.py", "family.py")]
    assert sum(len(path.read_text().splitlines()) for path in files) < 150


_ENTRIES = re.compile(r"^```json\n(\[.*?)^```$", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["DATALOADER.md", "DREAMBOOTH.md"])
def test_shown_entries_are_accepted(name: str, tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_family": "omnigen", "model_type": "full", "max_train_steps": 1}')
    shown = _ENTRIES.findall((PAGES / name).read_text(encoding="utf-8"))
    assert shown
    for entries in shown:
        (tmp_path / "multidatabackend.json").write_text(entries)
        loaded = load_arguments([], {}, tmp_path, print, check_files=False)
        assert len(loaded.datasets) == len(json.loads(entries))


def test_the_architecture_names_every_part_of_the_package():
    text = (PAGES / "ARCHITECTURE.md").read_text(encoding="utf-8")
    tops = [path for path in (ROOT / "simpletuner").iterdir() if not path.name.startswith("_")]
    modules = [path.name for path in tops if path.suffix == ".py"]
    packages = [f"{path.name}/" for path in tops if (path / "__init__.py").is_file()]
    assert {"config/", "training/", "storage.py"} <= {*modules, *packages}
    assert [name for name in [*modules, *packages] if f"`{name}" not in text] == []


# `training/loop.py`, `adapters/base.py:Adapter`, `config/options/`: from the repository, the package or the tests.
_PATH = re.compile(r"`((?:\w+/)+(?:\w+\.py)?)(?::(\w+(?:\.\w+)*))?`")
# `loop.is_due`, `training.trainer.train`, `Checkpoints.has`
_DOTTED = re.compile(r"`(\w+(?:\.\w+)+)`")
ABOUT_CODE = [
    ROOT / "CONTRIBUTING.md",
    *(PAGES / name for name in ("ARCHITECTURE.md", "ADDING_A_MODEL.md", "DECISIONS.md")),
]


def defines(files: Iterable[Path], name: str) -> bool:
    """Whether one of the files has a function, class or attribute of this name."""
    definition = re.compile(rf"^ *(?:(?:def|class) {name}\b|self\.{name}\b.*=)", re.MULTILINE)
    return any(definition.search(file.read_text("utf-8")) for file in files)


def is_code(dotted: str) -> bool:
    """Whether a module or class of the package has what a dotted name says."""
    *places, name = dotted.split(".")
    where = places[-1]
    files = [*(ROOT / "simpletuner").rglob(f"{where}.py"), *(ROOT / "simpletuner").glob(f"{where}/*.py")]
    if where[0].isupper():
        files = [file for file in (ROOT / "simpletuner").rglob("*.py") if defines([file], where)]
    return defines(files, name)


@pytest.mark.parametrize("page", ABOUT_CODE, ids=lambda page: page.name)
def test_paths_of_code_that_pages_name_exist(page: Path):
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    roots = (ROOT, ROOT / "simpletuner", ROOT / "tests")
    missing = []
    for path, name in _PATH.findall(text):
        found = [root / path for root in roots if (root / path).exists()]
        if (path.endswith(".py") and not found) or (name and not defines(found, name.split(".")[-1])):
            missing.append(path)
    assert missing == []


def test_the_architecture_names_code_that_exists():
    text = (PAGES / "ARCHITECTURE.md").read_text(encoding="utf-8")
    names = [name for name in _DOTTED.findall(text) if not name.endswith((".py", ".json", ".jsonl", ".toml"))]
    assert {"training.trainer.train", "loop.is_due", "Checkpoints.rotate"} <= set(names)
    assert [name for name in names if not is_code(name)] == []
    assert not is_code("loop.is_overdue")
    assert not is_code("Checkpoints.forget")
    folders = [path for path, _ in _PATH.findall(text) if path.endswith("/")]
    assert [path for path in folders if not any((root / path).is_dir() for root in (ROOT, ROOT / "simpletuner"))] == []


@pytest.mark.slow
def test_messages_that_explain_a_missing_checkpoint_are_the_program_s():
    text = (PAGES / "ARCHITECTURE.md").read_text(encoding="utf-8")
    [section] = re.findall(r"^## Why was no checkpoint written\n(.*?)^## ", text, re.DOTALL | re.MULTILINE)
    quoted = re.findall(r"^\d\. `([^`]+)`", section, re.MULTILINE)
    assert len(quoted) > 3
    texts = [text for path in (ROOT / "simpletuner").rglob("*.py") for text in texts_of(path)]
    # N and K stand for numbers.
    parts = [part for message in quoted for part in re.split(r"\b[NK]\b", message) if " " in part.strip()]
    assert [part for part in parts if not any(part.strip(" :") in text for text in texts)] == []


def test_every_verb_stands_in_a_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.rglob("*.md"))
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    verbs |= {str(group.name) for group in app.registered_groups}
    assert {"train", "generate", "cache"} <= verbs
    assert [verb for verb in sorted(verbs) if f"simpletuner {verb}" not in text] == []


def test_the_page_on_families_names_every_method_of_the_contract():
    [family] = [
        node
        for node in ast.parse((ROOT / "simpletuner/models/family.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name == "ModelFamily"
    ]
    methods = [node.name for node in family.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    before_the_code = (PAGES / "ADDING_A_MODEL.md").read_text(encoding="utf-8").partition("<!-- file:")[0]
    assert "predict" in methods
    assert [name for name in methods if f"`{name}`" not in before_the_code] == []


def test_every_benchmark_has_a_row():
    text = (PAGES / "BENCHMARKS.md").read_text(encoding="utf-8")
    scripts = [path.name for path in (ROOT / "benchmarks").glob("*.py") if "def main" in path.read_text("utf-8")]
    assert "lokr_cost.py" in scripts
    assert [name for name in scripts if f"`python benchmarks/{name}" not in text] == []


def test_every_extra_is_explained():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (PAGES / "INSTALL.md").read_text(encoding="utf-8")
    assert [name for name in project["optional-dependencies"] if name != "dev" and f"`{name}`" not in text] == []
