"""Messages are written for people. What tests provoke is looked at by `conftest.py`; here, all of the source is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import simpletuner
from simpletuner.errors import (
    EXITS_OF_SIGNALS,
    ConfigError,
    DataError,
    DivergedError,
    Interrupted,
    MissingDependency,
    Problem,
    SimpleTunerError,
    UploadError,
    bytes_text,
    error_text,
    plain_value,
    shape_text,
)
from tests.messages import faults_of

ROOT = Path(simpletuner.__file__).parent
# Calls whose texts are read by people, and names that such texts are given.
CALLS = {
    "Problem",
    "Notice",
    "problem",
    "dataset_problem",
    "_problem",
    "_fault",
    "emit",
    "say",
    "DamagedShard",
    "UnusableImage",
}
NAMES = {"message", "text", "reason", "fix", "allowed", "what", "line", "detail"}
# Our own mistakes, which show a traceback.
OUR_OWN = ("TypeError", "AssertionError")
# Text of programs: Python that is shown on purpose.
CODE = ("hub/usage.py",)
CONTAINERS = {"sorted", "list", "dict", "tuple", "set", "frozenset", "type", "repr", "vars"}
SECRET_NAMES = ("digest", "fingerprint", "sha256", "hexdigest")
DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.Tuple, ast.ListComp)


def shown_values(tree: ast.AST) -> Iterator[tuple[ast.FormattedValue, str]]:
    """Each value in an f-string, with the text behind it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            for value, after in zip(node.values, [*node.values[1:], None], strict=True):
                if isinstance(value, ast.FormattedValue):
                    yield value, str(after.value) if isinstance(after, ast.Constant) else ""


def messages_in(tree: ast.AST) -> Iterator[ast.AST]:
    """Arguments of calls that make messages, and texts that are given a name like one."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in CALLS or (name.endswith(("Error", "Fault")) and name not in OUR_OWN):
                yield from (*node.args, *(keyword.value for keyword in node.keywords))
        names = [each.id for each in getattr(node, "targets", []) if isinstance(each, ast.Name)]
        if isinstance(node, ast.Assign) and NAMES & set(names):
            yield node.value


def faults_in(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for value, after in shown_values(tree):
        if after.lstrip().startswith("bytes"):
            yield value.lineno, "a number of bytes without a unit"
    for message in messages_in(tree):
        for value, _ in shown_values(message):
            source = ast.unparse(value.value)
            parts = value.value.values if isinstance(value.value, ast.BoolOp) else [value.value]
            calls = {part.func.id for part in parts if isinstance(part, ast.Call) and isinstance(part.func, ast.Name)}
            if value.conversion == ord("r") or calls & CONTAINERS or any(isinstance(part, DISPLAYS) for part in parts):
                yield value.lineno, f"Python's notation: {source}"
            if any(isinstance(part, ast.Attribute) and part.attr in ("shape", "dtype") for part in parts):
                yield value.lineno, f"torch's notation: {source}"
            if any(isinstance(part, ast.Name | ast.Attribute) and source.endswith(SECRET_NAMES) for part in parts):
                yield value.lineno, f"a digest: {source}"


@pytest.mark.slow
def test_no_message_is_written_to_show_python_or_digests_or_bytes() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {fault}"
        for path in sorted(ROOT.rglob("*.py"))
        if str(path.relative_to(ROOT)) not in CODE
        for line, fault in faults_in(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        'Problem(f"{value!r} is not a number")',
        'raise DataError(Problem(f"in {sorted(names)}"))',
        'bus.emit(Notice("info", f"{names or list(others)}"))',
        'message = f"shape {tensor.shape}"',
        'Problem(f"was {saved.fingerprint}")',
        'print(f"{size:,} bytes")',
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert list(faults_in(ast.parse(source)))


@pytest.mark.parametrize(
    "text",
    [
        "captions: ['a', 'b']",
        "told {'a': 1}",
        "shape (4,)",
        "a <class 'int'>",
        "at PosixPath('x')",
        "factor None -> 4",
        "is True",
        "was 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "needs 33,554,432 bytes",
        "KeyError('files')",
    ],
)
def test_a_message_for_programs_is_recognized(text: str) -> None:
    assert faults_of(text)


@pytest.mark.parametrize(
    "text",
    [
        'set it to "None", or [1.0, 0.75]',
        "None of the images can be used",
        "cache/shard-9f86d081884c7d659a2feaa0c55ad015.safetensors is cut short",
        "needs 32.0 MiB; 1,000 bytes are free",
        '{"factor": 4}',
    ],
)
def test_a_message_for_people_is_left_alone(text: str) -> None:
    assert not faults_of(text)


def test_values_in_words() -> None:
    values = [None, True, 0.1, 1e-08, ["a", 2], {"a": None}, [], Path("x")]
    assert [plain_value(value) for value in values] == [
        "unset", "true", "0.1", "1e-08", "a, 2", "a unset", "nothing", "x",
    ]  # fmt: skip
    assert [shape_text(shape) for shape in ((4, 8), ())] == ["4 x 8", "1 number"]
    assert error_text(KeyError("files")) == "it has no files"
    assert error_text(ValueError("a\nb")) == "a b"


def test_a_problem_has_its_place_first_and_what_to_do_below() -> None:
    whole = Problem("is 3", "data.crop", "a.json", 7, "1 or 2", "write 1")
    assert whole.render() == "a.json:7: data.crop: is 3\n  allowed: 1 or 2\n  fix: write 1"
    assert Problem("is 3", file="a.json").render() == "a.json: is 3"
    assert Problem("is 3", line=7, fix="write 1").render() == "is 3\n  fix: write 1"
    assert Problem("is 3", "crop", "a.json", 0).render() == "a.json:0: crop: is 3"
    error = DataError([whole, Problem("and this")])
    assert str(error) == f"{whole.render()}\nand this"
    assert SimpleTunerError("only a text").problems == [Problem("only a text")]
    assert SimpleTunerError(whole).problems == [whole]


def test_each_kind_of_error_ends_the_program_with_its_code() -> None:
    kinds = (ConfigError, MissingDependency, DataError, DivergedError, UploadError, Interrupted, SimpleTunerError)
    assert [kind("x").exit_code for kind in kinds] == [2, 2, 3, 4, 5, 130, 1]
    assert Interrupted("x", 143).exit_code == 143
    assert EXITS_OF_SIGNALS == (129, 130, 143)


def test_numbers_of_bytes_and_values_have_the_shortest_text_that_says_them() -> None:
    found = [bytes_text(number) for number in (1024, 1024**2 - 1, 1024**2, 1024**3, 1024**4 * 3, -2048, 1.6)]
    assert found == ["1.0 KiB", "1024.0 KiB", "1.0 MiB", "1.0 GiB", "3.0 TiB", "-2.0 KiB", "2 bytes"]
    assert plain_value(1 / 3) == "0.3333333333"
    assert [plain_value(value) for value in ({}, (), b"x", "", {"a": [1, True]})] == [
        *("nothing", "nothing", "b'x'", "", "a 1, true")
    ]
    assert shape_text((3,)) == "3"
    assert [error_text(error) for error in (KeyError(), ValueError(" "))] == [
        "it has no such key",
        "it has another form",
    ]
