"""Plants known faults in a copy of the package, one at a time, and asks the tests whether they see them.

    python scripts/mutants.py                  every fault of scripts/mutants/
    python scripts/mutants.py training storage those of some lists; also by words of their description
    python scripts/mutants.py --sample 20      a random sample, another one for each commit
    python scripts/mutants.py --check          only whether every fault still fits the code

A list is a TOML file for each package: where a fault is (file, function, an expression in it), what stands there
instead, why it matters, and which tests should see it. The expression has to occur once in that function; line breaks
count as spaces. Code that has moved makes its entries stale, which is an error: give them their new place, or remove
them with what they were about. New code comes with its own entries.

Results are kept in build/mutants.jsonl, by the content of the entry, the mutated file and its tests, so that a run that
was stopped goes on where it was. The working tree is never changed. Tests run in forks of a process that has imported
the package from a copy; a fork puts the code of its fault in, or imports all anew where that is no function's.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib
import io
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "scripts" / "mutants"
RESULTS = ROOT / "build" / "mutants.jsonl"
# Forks see their copy alone.
FORGOTTEN = (ROOT, ROOT / "scripts")
# Of all; and the packages on which everything else stands, where none may survive.
FEWEST_CAUGHT = 0.95
STRICT = ("training", "storage", "distributed")
TEST_SECONDS = 120
# Of other tests those marked slow are left out.
WHOLE_RUNS = ("tests/end_to_end", "tests/families")
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


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
        return mutated

    def key(self) -> str:
        """Changes with the entry, the file that it changes, and its tests."""
        digest = hashlib.sha256(repr(self).encode())
        for path in sorted({ROOT / "simpletuner" / self.file, *test_files(self.tests)}):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:20]


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
                raise StaleError(f"{mutant.title}\n    there is no such file")
            mutant.apply(path.read_text(encoding="utf-8"))
            test_files(mutant.tests)
        except StaleError as error:
            problems.append(f"{mutant.package}.toml: {error}")
    doubled = [title for title, count in Counter(mutant.title for mutant in mutants).items() if count > 1]
    return problems + [f"two entries are called {title}" for title in doubled]


# ---- running -------------------------------------------------------------------------------------------------------


class Scratch:
    """A copy of everything that tests need; one fault at a time is planted in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)
        self._planted: tuple[Path, bytes, float] | None = None
        self._count = 0

    def plant(self, mutant: Mutant) -> None:
        path = self.folder / "simpletuner" / mutant.file
        original = path.read_bytes()
        modified = path.stat().st_mtime
        path.write_text(mutant.apply(original.decode()), encoding="utf-8")
        # Compiled files are told apart by whole seconds and size: each fault gets a time of its own.
        self._count += 1
        os.utime(path, (modified + 10 * self._count, modified + 10 * self._count))
        self._planted = path, original, modified

    def revert(self) -> None:
        if self._planted is not None:
            path, original, modified = self._planted
            path.write_bytes(original)
            os.utime(path, (modified, modified))
            self._planted = None


@dataclass
class Attempt:
    """Tests that run in a fork, with one fault or with none."""

    scratch: Scratch
    mutant: Mutant | None
    tests: tuple[str, ...]
    child: int
    log: Path
    started: float

    def outcome(self, code: int | None) -> dict[str, object]:
        """What became of it; `code` None where it took too long."""
        text = self.log.read_text(errors="replace")
        test = FAILED.search(text)
        seconds = round(time.monotonic() - self.started, 1)
        if code is None:
            return {"result": "caught", "by": f"no end after {TEST_SECONDS} s", "seconds": seconds}
        if code == 1 and test is not None:
            return {"result": "caught", "by": test.group(1), "seconds": seconds}
        if code == 0:
            return {"result": "survived", "by": "", "seconds": seconds}
        return {"result": "broken", "by": f"exit code {code}: {text[-1500:]}", "seconds": seconds}


def import_package(folder: Path) -> None:
    """Import all of the package, from a copy: forks then have it, and only their fault has to be put in."""
    sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import simpletuner

        for module in pkgutil.walk_packages(simpletuner.__path__, "simpletuner."):
            if "__main__" not in module.name:
                importlib.import_module(module.name)
        for name in ("tests.tiny", "tests.tiny_sdxl", "tests.tiny_flux", "tests.tiny_sd3", "tests.processes"):
            importlib.import_module(name)
    assert Path(simpletuner.__file__).is_relative_to(folder)


def put_in(mutant: Mutant, source: str) -> bool:
    """Give the imported function of a fault the code that it has in `source`; False where it is no function's."""
    found: object = importlib.import_module("simpletuner." + mutant.file.removesuffix(".py").replace("/", "."))
    code: CodeType | None = compile(source, found.__file__, "exec")  # type: ignore[attr-defined]
    for name in mutant.function.split("."):
        code = next((each for each in reversed(_inner(code)) if each.co_name == name), None)
        found = vars(found).get(name)
        if code is None or found is None:
            return False
        if not isinstance(found, type):
            break  # what stands inside of it is part of its code
    function = _bare(found)
    if function is None or code is None or function.__code__.co_freevars != code.co_freevars:
        return False
    function.__code__ = code
    return True


def _inner(code: CodeType | None) -> list[CodeType]:
    return [each for each in code.co_consts if isinstance(each, CodeType)] if code is not None else []


def _bare(found: object) -> FunctionType | None:
    """The function itself, out of its decorators; None where there is none."""
    for _ in range(10):
        if isinstance(found, property):
            found = found.fget
        elif isinstance(found, staticmethod | classmethod):
            found = found.__func__
        elif isinstance(found, functools.cached_property):
            found = found.func
        elif hasattr(found, "__wrapped__"):
            found = found.__wrapped__
        else:
            break
    return found if isinstance(found, FunctionType) else None


def forget_package() -> None:
    """Import the package anew where it is next asked for: its values at import have changed."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("simpletuner", "tests")]:
        del sys.modules[name]


def start(scratch: Scratch, mutant: Mutant | None, tests: tuple[str, ...], log: Path) -> Attempt:
    """Plant a fault and run its tests in a fork."""
    if mutant is not None:
        scratch.plant(mutant)
    child = os.fork()
    if child == 0:
        _run_tests(scratch.folder, mutant, tests, log)
    return Attempt(scratch, mutant, tests, child, log, time.monotonic())


def _run_tests(folder: Path, mutant: Mutant | None, tests: tuple[str, ...], log: Path) -> None:
    """In the fork: never returns."""
    code = 99
    try:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        sys.path[:] = [str(folder), *(path for path in sys.path if Path(path or ".").resolve() not in FORGOTTEN)]
        if mutant is not None:
            source = (folder / "simpletuner" / mutant.file).read_text(encoding="utf-8")
            if not (mutant.function and put_in(mutant, source)):
                forget_package()
        import pytest

        options = ["-x", "-q", "--tb=line", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
        if not any(test.startswith(WHOLE_RUNS) for test in tests):
            options += ["-m", "not slow"]
        code = int(pytest.main([*options, f"--basetemp={log.with_suffix('.tmp')}", *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_all(
    work: Sequence[tuple[Mutant | None, tuple[str, ...]]], workers: int, deadline: float
) -> Iterator[tuple[Mutant | None, tuple[str, ...], dict[str, object]]]:
    """Each result as it comes; what has not begun at `deadline` is left out."""
    waiting, running = list(reversed(work)), dict[int, Attempt]()
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        free = []
        for number in range(min(workers, len(work))):
            (Path(name) / f"copy{number}").mkdir()
            free.append(Scratch(Path(name) / f"copy{number}"))
        count = 0
        import_package(free[0].folder)
        try:
            while waiting or running:
                while waiting and free and time.monotonic() < deadline:
                    count += 1
                    attempt = start(free.pop(), *waiting.pop(), Path(name) / f"{count}.log")
                    running[attempt.child] = attempt
                if not running:
                    return
                for attempt in list(running.values()):
                    ended, status = os.waitpid(attempt.child, os.WNOHANG)
                    is_late = not ended and time.monotonic() - attempt.started > TEST_SECONDS
                    if not ended and not is_late:
                        continue
                    _end_group(attempt.child)
                    if is_late:
                        os.waitpid(attempt.child, 0)
                    result = attempt.outcome(None if is_late else os.waitstatus_to_exitcode(status))
                    del running[attempt.child]
                    attempt.scratch.revert()
                    shutil.rmtree(attempt.log.with_suffix(".tmp"), ignore_errors=True)
                    free.append(attempt.scratch)
                    yield attempt.mutant, attempt.tests, result
                time.sleep(0.02)
        finally:
            for attempt in running.values():
                _end_group(attempt.child)


def _end_group(child: int) -> None:
    """End what the tests of one fork have started and left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="lists, files or words of the description")
    parser.add_argument("--sample", type=int, help="so many of them, at random; the commit is the seed")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no more after so long")
    parser.add_argument("--again", action="store_true", help="forget what earlier runs found")
    parser.add_argument("--survivors", action="store_true", help="only those that survived the last time")
    parser.add_argument("--check", action="store_true", help="only whether each entry fits the code")
    given = parser.parse_args()

    mutants = read_lists()
    if problems := check(mutants):
        print("\n".join(problems), file=sys.stderr)
        print(f"{len(problems)} of {len(mutants)} entries are stale: the code has moved", file=sys.stderr)
        return 2
    if given.check:
        print(f"{len(mutants)} faults fit the code: {dict(Counter(mutant.package for mutant in mutants))}")
        return 0
    mutants = [each for each in mutants if _is_wanted(each, given.words)]
    mutants.sort(key=lambda each: each.package not in STRICT)
    if given.sample is not None:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        mutants = random.Random(commit.stdout).sample(mutants, min(given.sample, len(mutants)))
    known = {} if given.again else read_results()
    results = {mutant: known[key] for mutant in mutants if (key := mutant.key()) in known}
    if given.survivors:
        last = {record["title"] for record in read_results(last=True).values() if record["result"] != "caught"}
        mutants = [mutant for mutant in mutants if mutant.title in last]
        results = {}
    open_ones = [mutant for mutant in mutants if mutant not in results]
    print(f"{len(mutants)} faults, {len(results)} known, {len(open_ones)} to plant", flush=True)
    run_open(open_ones, results, given.workers, time.monotonic() + 60 * given.minutes)
    return report(mutants, results)


def _is_wanted(mutant: Mutant, words: Sequence[str]) -> bool:
    return not words or any(word == mutant.package or word in mutant.title for word in words)


def run_open(mutants: Sequence[Mutant], results: dict[Mutant, dict], workers: int, deadline: float) -> None:
    """Fill in `results`, and keep each of them in the file."""
    if not mutants:
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    RESULTS.parent.mkdir(exist_ok=True)
    keys = {mutant: mutant.key() for mutant in mutants}
    # A test that fails without a fault catches nothing: before the first fault its tests run without any.
    work: dict[tuple[Mutant | None, tuple[str, ...]], None] = {}
    for mutant in mutants:
        work |= {(None, mutant.tests): None, (mutant, mutant.tests): None}
    failing: dict[tuple[str, ...], object] = {}
    with RESULTS.open("a", encoding="utf-8") as file:
        for mutant, tests, result in run_all(list(work), workers, deadline):
            if mutant is None:
                if result["result"] != "survived":
                    failing[tests] = result["by"]
                    print(f"these tests fail without any fault: {' '.join(tests)}\n    {result['by']}", flush=True)
                continue
            results[mutant] = result
            if tests in failing:
                results[mutant] = {"result": "broken", "by": f"fails without it: {failing[tests]}", "seconds": 0}
                continue
            file.write(json.dumps({"key": keys[mutant], "title": mutant.title, **result}) + "\n")
            file.flush()
            shown = result["by"] if result["result"] == "caught" else str(result["by"])[:1500]
            print(f"{result['result']:9}{result['seconds']:6} s  {mutant.title}  [{shown}]", flush=True)


def read_results(last: bool = False) -> dict[str, dict]:
    """Earlier results by key; with `last`, by title."""
    if not RESULTS.is_file():
        return {}
    records = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return {record["title" if last else "key"]: record for record in records if record["result"] != "broken"}


def report(mutants: Sequence[Mutant], results: dict[Mutant, dict]) -> int:
    """Print what was found by package; 0 where enough was caught."""
    tried = [mutant for mutant in mutants if mutant in results]
    missed = [mutant for mutant in tried if results[mutant]["result"] != "caught"]
    for package in dict.fromkeys(mutant.package for mutant in tried):
        of_package = [mutant for mutant in tried if mutant.package == package]
        caught = sum(mutant not in missed for mutant in of_package)
        print(f"{package:14}{caught:4} of {len(of_package)}")
    for mutant in missed:
        print(f"{results[mutant]['result']}: {mutant.title}")
    print(f"caught {len(tried) - len(missed)} of {len(tried)}; {len(mutants) - len(tried)} were not tried")
    is_strict = any(mutant.package in STRICT for mutant in missed)
    return int(is_strict or len(missed) > (1 - FEWEST_CAUGHT) * max(len(tried), 1))


if __name__ == "__main__":
    sys.exit(main())
