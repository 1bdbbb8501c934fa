"""The planted faults fit the code, and the tool that plants them changes what it says and nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

import mutant_lists
import mutant_runs
import mutants
from mutant_lists import Mutant, StaleError

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
    return Mutant("box", "box.py", function, find, replace, "why", ())


@pytest.mark.slow
def test_every_planted_fault_fits_the_code():
    """A stale one says where it was: move it to where its code is now, or remove it with what it was about."""
    assert mutant_lists.check(mutant_lists.read_lists()) == []


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
        ("first", "values[0]", "vales[0]", "there is no vales"),
    ],
)
def test_a_fault_that_does_not_fit_is_an_error(function: str, find: str, replace: str, says: str):
    with pytest.raises(StaleError, match=says):
        fault(function, find, replace).apply(SOURCE)


def test_what_ran_well_survived_and_what_failed_was_caught():
    caught = mutant_runs.outcome(1, "tests/unit/test_a.py::test_b", 1.0)
    assert (caught["result"], caught["by"]) == ("caught", "tests/unit/test_a.py::test_b")
    assert mutant_runs.outcome(None, "", 1.0)["result"] == "caught"
    assert mutant_runs.outcome(0, "", 1.0)["result"] == "survived"
    assert [mutant_runs.outcome(code, "", 1.0)["result"] for code in (1, 2, 3, 4, 5, 99, -9)] == ["broken"] * 7


def test_the_code_of_a_fault_takes_the_place_of_the_imported_function_s():
    """And of one in a decorator; a value of the module has to be imported again."""
    from simpletuner.training import evaluation, loss_scale
    from simpletuner.training.evaluation import best_step

    scale = loss_scale.LossScale(True, 2.0)
    unscale = mutant_runs._bare(loss_scale.LossScale.unscale)
    kept = evaluation.best_step.__code__, unscale.__code__
    source = (mutant_lists.ROOT / "simpletuner/training/evaluation.py").read_text()
    try:
        fault = Mutant("", "training/evaluation.py", "best_step", "-step", "step", "why", ())
        assert mutant_runs.put_in(fault, source.replace("(trained[step], step)", "(trained[step], -step)"))
        assert best_step({1: 0.5, 2: 0.5}) == 2
        source = (mutant_lists.ROOT / "simpletuner/training/loss_scale.py").read_text()
        fault = Mutant("", "training/loss_scale.py", "LossScale.unscale", "_div_", "_mul_", "why", ())
        assert mutant_runs.put_in(fault, source.replace("_foreach_div_", "_foreach_mul_"))
        parameter = torch.nn.Parameter(torch.ones(1))
        parameter.grad = torch.ones(1)
        scale.unscale([parameter])
        assert parameter.grad.item() == 2
    finally:
        evaluation.best_step.__code__, unscale.__code__ = kept
    assert not mutant_runs.put_in(Mutant("", "training/loss_scale.py", "", "2000", "2001", "why", ()), source, dry=True)


def test_too_many_survivors_fail_and_any_of_the_packages_on_which_all_stands(capsys):
    def one(number: int, package: str):
        return Mutant(package, f"{number}.py", "", "a", "b", "why", ())

    caught, survived = {"result": "caught"}, {"result": "survived"}
    many = [one(number, "data") for number in range(20)]
    assert mutants.report(many, dict.fromkeys(many, caught)) == 0
    assert mutants.report(many, dict.fromkeys(many, caught) | {many[0]: survived}) == 0
    assert mutants.report(many, dict.fromkeys(many, caught) | dict.fromkeys(many[:2], survived)) == 1
    strict = [*many, one(99, "training")]
    assert mutants.report(strict, dict.fromkeys(strict, caught) | {strict[-1]: survived}) == 1
    assert "survived: 99.py" in capsys.readouterr().out
