"""Planted faults as `scripts/mutants/` lists them, and whether each still fits the code."""

from __future__ import annotations

import ast
import builtins
import hashlib
import re
import symtable
import tomllib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "scripts" / "mutants"


class StaleError(Exception):
    """An entry that does not fit the code."""


@dataclass(frozen=True)
class Mutant:
    """One planted fault.

    Args:
        package: the list that it stands in.
        file: below `simpletuner/`.
        function: `name` or `Class.method`; "" for the whole file.
        find: what stands there.
        replace: what stands there instead.
        why: what goes wrong.
        tests: should see it.
    """

    package: str
    file: str
    function: str
    find: str
    replace: str
    why: str
    tests: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"{self.file} {self.function}: {self.why}"

    def apply(self, source: str) -> str:
        """The source with the fault in it.

        Raises:
            StaleError: there is no such function, or the expression does not occur once in it.
        """
        start, end = _span(source, self.function)
        words = r"\s+".join(map(re.escape, self.find.split()))
        found = list(re.finditer(words, source[start:end]))
        if len(found) != 1:
            raise StaleError(f"{self.title}\n    {self.find!r} occurs {len(found)} times in it")
        place = found[0]
        mutated = source[: start + place.start()] + self.replace + source[start + place.end() :]
        try:
            same = ast.dump(ast.parse(mutated)) == ast.dump(ast.parse(source))
        except SyntaxError as error:
            raise StaleError(f"{self.title}\n    is no Python with {self.replace!r}: {error}") from error
        if same:
            raise StaleError(f"{self.title}\n    {self.replace!r} changes nothing")
        if unknown := undefined(mutated) - undefined(source):  # any test would see that, whatever it compares
            raise StaleError(f"{self.title}\n    there is no {', '.join(sorted(unknown))}")
        return mutated

    def key(self) -> str:
        """Changes with the entry, the file that it changes, and its tests."""
        digest = hashlib.sha256(repr(self).encode())
        for path in sorted({ROOT / "simpletuner" / self.file, *test_files(self.tests)}):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:20]


def undefined(source: str) -> set[str]:
    """Names that the functions of a module take from it, and that it does not have."""
    used: set[str] = set()
    tables = [module := symtable.symtable(source, "", "exec")]
    while tables:
        table = tables.pop()
        used.update(name.get_name() for name in table.get_symbols() if name.is_global() and name.is_referenced())
        tables += table.get_children()
    own = {name.get_name() for name in module.get_symbols() if name.is_assigned() or name.is_imported()}
    return used - own - set(dir(builtins))


def test_files(tests: Sequence[str]) -> list[Path]:
    """The files of pytest's arguments; folders with all that is in them."""
    files: list[Path] = []
    for test in tests:
        path = ROOT / test.partition("::")[0]
        if not path.exists():
            raise StaleError(f"there are no tests {test}")
        files += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return files


def _span(source: str, function: str) -> tuple[int, int]:
    """First and last character of a function or class, without its decorators."""
    if not function:
        return 0, len(source)
    node: ast.AST = ast.parse(source)
    for name in function.split("."):
        inner = [
            each
            for each in ast.walk(node)
            if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and each.name == name
        ]
        if not inner:
            raise StaleError(f"there is no {function}")
        node = inner[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    lines = source.splitlines(keepends=True)
    first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
    return len("".join(lines[: first - 1])), len("".join(lines[: node.end_lineno]))


def read_lists(folder: Path = LISTS) -> list[Mutant]:
    """Every entry of every list. In a list, `tests` at the top is for entries that name none."""
    mutants = []
    for path in sorted(folder.glob("*.toml")):
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        for entry in content["mutant"]:
            tests = tuple(entry.pop("tests", None) or content["tests"])
            mutants.append(Mutant(path.stem, tests=tests, **{"function": "", **entry}))
    return mutants


def check(mutants: Sequence[Mutant]) -> list[str]:
    """What does not fit, one text for each entry."""
    problems = []
    for mutant in mutants:
        path = ROOT / "simpletuner" / mutant.file
        try:
            if not path.is_file():
                raise StaleError(f"{mutant.title}\n    there does not exist")
            mutant.apply(path.read_text(encoding="utf-8"))
            test_files(mutant.tests)
        except StaleError as error:
            problems.append(f"{mutant.package}.toml: {error}")
    doubled = [title for title, count in Counter(mutant.title for mutant in mutants).items() if count > 1]
    return problems + [f"two entries are called {title}" for title in doubled]
