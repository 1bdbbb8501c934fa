"""Runs tests with planted faults: in forks of a process that has imported the package and collected the tests.

A fork puts the code of its fault into the function that is imported already, and into a copy of the package's files for
programs that tests start. Where a fault is no function's, all is imported again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import pkgutil
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from mutant_lists import ROOT, Mutant

# Forks see their copy alone.
FORGOTTEN = (ROOT, ROOT / "scripts")
TEST_SECONDS = 120
# A fault may make processes wait for each other forever: its tests get what they take without it, so many times over.
SLOWER, AT_LEAST_SECONDS = 5, 20
# Of other tests those marked slow run last, and only with a fault that the others did not see.
WHOLE_RUNS = ("tests/end_to_end", "tests/families")


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
        self._originals: dict[Path, tuple[bytes, float]] = {}
        self._count = 0

    def plant(self, mutant: Mutant) -> None:
        path = self.folder / "simpletuner" / mutant.file
        original = path.read_bytes()
        modified = path.stat().st_mtime
        path.write_text(mutant.apply(original.decode()), encoding="utf-8")
        # Compiled files are distinguished by whole seconds and size: each fault gets a time of its own.
        self._count += 1
        os.utime(path, (modified + 10 * self._count, modified + 10 * self._count))
        self._planted = path, original, modified

    def revert(self) -> None:
        if self._planted is not None:
            path, original, modified = self._planted
            path.write_bytes(original)
            os.utime(path, (modified, modified))
            self._planted = None

    def remember(self, mutants: Sequence[Mutant]) -> None:
        """Before a process plants faults that it may not live to revert."""
        paths = {self.folder / "simpletuner" / mutant.file for mutant in mutants}
        self._originals = {path: (path.read_bytes(), path.stat().st_mtime) for path in paths}

    def restore(self) -> None:
        for path, (content, modified) in self._originals.items():
            path.write_bytes(content)
            os.utime(path, (modified, modified))


@dataclass(eq=False)  # pytest hashes its plugins
class Planter:
    """A plugin of pytest: when the tests are collected it runs them in forks, without a fault and with each of some.

    A fork puts the code of its fault into the function that is imported already.

    Args:
        scratch: the copy that the tests were collected from.
        mutants: of functions.
        results: a line of JSON for each; the first is that without a fault.
        deadline: after it no further one begins.
        slow_ones_last: whether slow tests only run with what the others did not see.
    """

    scratch: Scratch
    mutants: Sequence[Mutant]
    results: Path
    deadline: float
    slow_ones_last: bool
    failed: str = ""

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed = self.failed or (report.nodeid if report.failed else "")

    def pytest_runtestloop(self, session: Any) -> bool:
        if session.testsfailed:
            return True  # the tests cannot be collected: pytest's exit code says so
        slow = [item for item in session.items if self.slow_ones_last and item.get_closest_marker("slow")]
        fast = [item for item in session.items if item not in slow]
        sound = self.outcome_of(fast, None, TEST_SECONDS)
        write_result(self.results, None, sound)
        limit = min(TEST_SECONDS, AT_LEAST_SECONDS + SLOWER * sound["seconds"])
        sound_slow: dict[str, Any] | None = None
        for mutant in self.mutants:
            if time.monotonic() > self.deadline:
                break
            result = self.outcome_of(fast, mutant, limit)
            if result["result"] == "survived" and slow:
                result = self.outcome_of(slow, mutant, TEST_SECONDS)
                if result["result"] == "caught":
                    sound_slow = sound_slow or self.outcome_of(slow, None, TEST_SECONDS)
                    result = result if sound_slow["result"] == "survived" else sound_slow | {"result": "broken"}
            write_result(self.results, mutant, result)
        return True

    def outcome_of(self, items: Sequence[Any], mutant: Mutant | None, limit: float) -> dict[str, Any]:
        """Run tests in a fork, with a fault or without."""
        if mutant is not None:
            self.scratch.plant(mutant)
        started, (reading, writing) = time.monotonic(), os.pipe()
        child = os.fork()
        if child == 0:
            self._run(items, mutant, writing)
        os.close(writing)
        code = _wait(child, limit)
        seconds = time.monotonic() - started
        with os.fdopen(reading) as pipe:
            by = pipe.read() if code is not None else f"no end after {seconds:.0f} s"
        self.scratch.revert()
        return outcome(code, by, seconds)

    def _run(self, items: Sequence[Any], mutant: Mutant | None, writing: int) -> None:
        """In the fork: never returns."""
        code = 99
        try:
            os.setsid()
            if mutant is not None:
                put_in(mutant, (self.scratch.folder / "simpletuner" / mutant.file).read_text(encoding="utf-8"))
            for item, after in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
                if self.failed:
                    os.write(writing, self.failed.encode())
                    break
            code = int(bool(self.failed))
        except BaseException:  # noqa: BLE001 - the parent reports it
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(code)


def outcome(code: int | None, by: str, seconds: float) -> dict[str, Any]:
    """What became of a fault.

    Args:
        code: exit code of its tests; None where they took too long.
        by: the first test that failed, or what was printed.
    """
    seconds = round(seconds, 1)
    if code is None or (code == 1 and by):
        return {"result": "caught", "by": by, "seconds": seconds}
    if code == 0:
        return {"result": "survived", "by": "", "seconds": seconds}
    return {"result": "broken", "by": f"exit code {code}: {by[-1500:]}", "seconds": seconds}


def write_result(file: Path, mutant: Mutant | None, result: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as results:
        results.write(json.dumps({"title": mutant.title if mutant else None, **result}) + "\n")


def _wait(child: int, limit: float) -> int | None:
    """The exit code of a process group's leader, whose others are ended; None where it takes too long."""
    started, ended, status = time.monotonic(), 0, 0
    while not ended and time.monotonic() - started < limit:
        time.sleep(0.01)
        ended, status = os.waitpid(child, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    if not ended:
        os.waitpid(child, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def import_package(folder: Path) -> None:
    """Import all of the package, from a copy: forks then have it, and only their fault has to be put in."""
    sys.path.insert(0, str(folder))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import simpletuner

        for module in pkgutil.walk_packages(simpletuner.__path__, "simpletuner."):
            if "__main__" not in module.name:
                importlib.import_module(module.name)
        for name in (
            "tests.tiny",
            "tests.tiny_sdxl",
            "tests.tiny_flux",
            "tests.tiny_sd3",
            "tests.tiny_omnigen2",
            "tests.tiny_qwen_image",
            "tests.tiny_z_image",
            "tests.processes",
        ):
            importlib.import_module(name)
    assert Path(simpletuner.__file__).is_relative_to(folder)


def put_in(mutant: Mutant, source: str, dry: bool = False) -> bool:
    """Give the imported function of a fault the code that it has in `source`; False where it is not a function's.

    Args:
        dry: only say whether it can be done.
    """
    if not mutant.function:
        return False
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
    if not dry:
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
    """Import the package again where it is next asked for: its values at import have changed."""
    for name in [name for name in sys.modules if name.split(".")[0] in ("simpletuner", "tests")]:
        del sys.modules[name]


def run_group(scratch: Scratch, tests: tuple[str, ...], mutants: Sequence[Mutant], log: Path, deadline: float) -> int:
    """Start a process that runs the tests with each of the faults; those of one that is not a function's come alone.

    Results go to the log's name with `.jsonl`.
    """
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.chdir(scratch.folder)
        os.environ["PYTHONPATH"] = str(scratch.folder)
        kept = (path for path in sys.path if Path(path or ".").resolve() not in FORGOTTEN)
        sys.path[:] = [str(scratch.folder), *kept]
        results, inside = log.with_suffix(".jsonl"), mutants
        if len(mutants) == 1 and not is_put_in(mutants[0]):
            scratch.plant(mutants[0])
            forget_package()
            inside = []
        import pytest

        options = ["-q", "--tb=line", "--no-header", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore", "-s"]
        basetemp = f"--basetemp={log.with_suffix('.tmp')}"
        planter = Planter(scratch, inside, results, deadline, not any(test.startswith(WHOLE_RUNS) for test in tests))
        code = int(pytest.main([*options, basetemp, *tests], plugins=[planter]))
        if not results.exists():
            write_result(results, None, outcome(code or 99, log.read_text(errors="replace"), 0.0))
    finally:
        sys.stdout.flush()
        os._exit(code)


def is_put_in(mutant: Mutant) -> bool:
    source = (ROOT / "simpletuner" / mutant.file).read_text(encoding="utf-8")
    return put_in(mutant, mutant.apply(source), dry=True)


def run_all(mutants: Sequence[Mutant], workers: int, deadline: float) -> Iterator[tuple[Mutant, dict[str, Any]]]:
    """Each result as it comes; what has not begun at `deadline` is left out."""
    running: dict[int, tuple[Scratch, Group, Path]] = {}
    with tempfile.TemporaryDirectory(prefix="mutants-") as name:
        free = []
        for number in range(min(workers, len(mutants))):
            (Path(name) / f"copy{number}").mkdir()
            free.append(Scratch(Path(name) / f"copy{number}"))
        import_package(free[0].folder)
        waiting = groups_of(mutants)
        count = 0
        while waiting or running:
            while waiting and free and time.monotonic() < deadline:
                count += 1
                scratch, group, log = free.pop(), waiting.pop(0), Path(name) / f"{count}.log"
                scratch.remember(group.mutants)
                child = run_group(scratch, group.tests, group.mutants, log, deadline)
                running[child] = scratch, group, log
            if not running:
                return
            for child, (scratch, group, log) in list(running.items()):
                ended, _ = os.waitpid(child, os.WNOHANG)
                yield from group.new_results(log.with_suffix(".jsonl"))
                if ended:
                    del running[child]
                    scratch.restore()
                    shutil.rmtree(log.with_suffix(".tmp"), ignore_errors=True)
                    free.append(scratch)
            time.sleep(0.05)


@dataclass
class Group:
    """Faults that the same tests should see."""

    tests: tuple[str, ...]
    mutants: list[Mutant]
    alone: bool = False
    num_read: int = 0
    broken: str = ""

    def new_results(self, file: Path) -> Iterator[tuple[Mutant, dict[str, Any]]]:
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        for line in lines[self.num_read :]:
            self.num_read += 1
            result = json.loads(line)
            title = result.pop("title")
            if self.alone:
                yield self.mutants[0], result
            elif title is not None:
                mutant = next(each for each in self.mutants if each.title == title)
                yield mutant, {"result": "broken", "by": self.broken, "seconds": 0} if self.broken else result
            elif result["result"] != "survived":
                self.broken = f"its tests fail without it: {result['by']}"


def groups_of(mutants: Sequence[Mutant]) -> list[Group]:
    """By their tests; a fault that is not a function's is a group by itself."""
    groups: dict[tuple[str, ...], Group] = {}
    alone = []
    for mutant in mutants:
        if is_put_in(mutant):
            groups.setdefault(mutant.tests, Group(mutant.tests, [])).mutants.append(mutant)
        else:
            alone.append(Group(mutant.tests, [mutant], alone=True))
    return [*groups.values(), *alone]
