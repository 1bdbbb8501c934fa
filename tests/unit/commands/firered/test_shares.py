"""How often each task and each number of source images is trained, in numbers worked out by hand."""

from __future__ import annotations

import pytest

from simpletuner.commands.firered.shares import read_count_weights, read_task_weights, shares
from simpletuner.errors import ConfigError

ROWS = {"a": {0, 1}, "b": {1, 2}, "c": {3}}


def test_a_share_is_that_of_the_number_times_that_of_the_task_among_those_that_have_it() -> None:
    """w = 1, 1, 2 of n = 0, 1, 2 and 0.5, 1.2 of the tasks: n = 1 is in both, n = 0 in a alone, n = 2 in b alone."""
    notes: list[str] = []
    found = shares({0: 1.0, 1: 1.0, 2: 2.0}, {"a": 0.5, "b": 1.2}, ROWS, notes)
    assert found == pytest.approx(
        {("a", 0): 0.25, ("a", 1): 0.25 * 0.5 / 1.7, ("b", 1): 0.25 * 1.2 / 1.7, ("b", 2): 0.5}
    )
    assert sum(found.values()) == pytest.approx(1)
    assert notes == []


def test_a_weight_that_no_row_can_meet_is_left_out_and_reported() -> None:
    """The original never ends here: 0=1 with rows of edits alone."""
    notes: list[str] = []
    found = shares({0: 1.0, 1: 1.0, 2: 3.0}, {"b": 1.0}, ROWS, notes)
    assert found == pytest.approx({("b", 1): 0.25, ("b", 2): 0.75})
    assert len(notes) == 1
    assert "no row has 0 source images; the weights that are left are 1=0.25, 2=0.75" in notes[0]


def test_a_task_that_is_never_trained_is_reported() -> None:
    notes: list[str] = []
    found = shares({1: 1.0}, {"a": 1.0, "c": 1.0}, ROWS, notes)
    assert found == {("a", 1): 1.0}
    assert any("c is never trained: its rows with 3 source images have no weight" in line for line in notes)
    assert any("a is trained in part" in line for line in notes)


def test_weights_that_leave_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="no row of these tasks has 0 source images") as caught:
        shares({0: 1.0}, {"c": 1.0}, ROWS, [])
    assert "c: 3" in caught.value.render()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a=1,d=1", '"d" is not a folder of --train_data_meta_dir'),
        ("a", '"a" is not a weight'),
        ("a=-1", '"a=-1" is not a weight'),
        ("a=nan", '"a=nan" is not a weight'),
        ("a=inf", '"a=inf" is not a weight'),
        ("a=1,a=2", '"a" is given twice'),
        ("a=0,b=0", "no task has a weight above 0"),
    ],
)
def test_weights_of_tasks_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_task_weights(text, ["a", "b", "c"])
    assert words in caught.value.render()


def test_tasks_that_are_not_listed_are_not_trained() -> None:
    assert read_task_weights("a=0.5, b=0,c=1.0", ["a", "b", "c"]) == {"a": 0.5, "c": 1.0}
    assert read_task_weights(None, ["a", "b"]) == {"a": 1.0, "b": 1.0}


@pytest.mark.parametrize(("text", "words"), [("one=1", "not a number of source images"), ("0=0,1=0", "above 0")])
def test_weights_of_numbers_that_are_refused(text: str, words: str) -> None:
    assert read_count_weights("0=0,1=10,2=0,3=0") == {1: 10.0}
    with pytest.raises(ConfigError) as caught:
        read_count_weights(text)
    assert words in caught.value.render()
