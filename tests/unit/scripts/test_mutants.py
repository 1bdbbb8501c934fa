"""The planted faults fit the code, and the tool that plants them changes what it says and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SPEC = importlib.util.spec_from_file_location("mutants", ROOT / "scripts" / "mutants.py")
assert SPEC is not None
assert SPEC.loader is not None
mutants = importlib.util.module_from_spec(SPEC)
sys.modules["mutants"] = mutants
SPEC.loader.exec_module(mutants)

SOURCE = """
LIMIT = 3


def first(values):
    return values[0] + LIMIT


class Box:
    @property
    def size(self):
        return min(
            self.width,
            self.height,
        )

    def first(self):
        return self.values[0] + LIMIT
"""


def fault(function: str, find: str, replace: str):
    return mutants.Mutant("box", "box.py", function, find, replace, "why", ())


def test_every_planted_fault_fits_the_code():
    """A stale one says where it was: move it to where its code is now, or remove it with what it was about."""
    assert mutants.check(mutants.read_lists()) == []


def test_a_fault_is_planted_in_its_function_alone():
    assert fault("first", "values[0]", "values[-1]").apply(SOURCE) == SOURCE.replace(" values[0]", " values[-1]", 1)
    assert fault("Box.first", "self.values[0]", "self.values[1]").apply(SOURCE).count("self.values[1]") == 1
    assert "LIMIT = 4" in fault("", "LIMIT = 3", "LIMIT = 4").apply(SOURCE)


def test_line_breaks_count_as_spaces():
    assert "max( self.width" in fault("Box.size", "min( self.width,", "max( self.width,").apply(SOURCE)


@pytest.mark.parametrize(
    ("function", "find", "replace", "says"),
    [
        ("second", "values", "x", "there is no second"),
        ("first", "values[1]", "x", "occurs 0 times"),
        ("", "values[0]", "x", "occurs 2 times"),
        ("first", "values[0]", "values[", "is no Python"),
        ("first", "values[0]", "(values[0])", "changes nothing"),
    ],
)
def test_a_fault_that_does_not_fit_is_an_error(function: str, find: str, replace: str, says: str):
    with pytest.raises(mutants.StaleError, match=says):
        fault(function, find, replace).apply(SOURCE)


def test_what_ran_well_survived_and_what_failed_was_caught(tmp_path):
    log = tmp_path / "log"
    log.write_text("FAILED tests/unit/test_a.py::test_b - assert 1 == 2\n")
    attempt = mutants.Attempt(None, None, (), 0, log, 0.0)
    assert attempt.outcome(1)["result"] == "caught"
    assert attempt.outcome(1)["by"] == "tests/unit/test_a.py::test_b"
    assert attempt.outcome(None)["result"] == "caught"
    assert attempt.outcome(0)["result"] == "survived"
    assert [attempt.outcome(code)["result"] for code in (2, 3, 4, 5, 99, -9)] == ["broken"] * 6


def test_too_many_survivors_fail_and_any_of_the_packages_on_which_all_stands(capsys):
    def one(number: int, package: str):
        return mutants.Mutant(package, f"{number}.py", "", "a", "b", "why", ())

    caught, survived = {"result": "caught"}, {"result": "survived"}
    many = [one(number, "data") for number in range(20)]
    assert mutants.report(many, dict.fromkeys(many, caught)) == 0
    assert mutants.report(many, dict.fromkeys(many, caught) | {many[0]: survived}) == 0
    assert mutants.report(many, dict.fromkeys(many, caught) | dict.fromkeys(many[:2], survived)) == 1
    strict = [*many, one(99, "training")]
    assert mutants.report(strict, dict.fromkeys(strict, caught) | {strict[-1]: survived}) == 1
    assert "survived: 99.py" in capsys.readouterr().out
