"""The nearest of the known names: by edits that are counted for every pair, not only for those that share letters."""

from __future__ import annotations

import random

import pytest

from simpletuner.config.options import all_options
from simpletuner.spelling import did_you_mean, edit_distance, nearest

KNOWN = sorted(all_options())


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [("seed", "seed", 0), ("sede", "seed", 1), ("sead", "seed", 1), ("see", "seed", 1), ("seeed", "seed", 1),
     ("kitten", "sitting", 3), ("", "abc", 3)],
)  # fmt: skip
def test_edits_are_insertions_deletions_replacements_and_exchanges(a: str, b: str, edits: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == edits


def test_as_many_replaced_letters_as_may_differ_are_still_near() -> None:
    """A replaced letter is one that lacks and one that is too many, and counts once."""
    assert nearest("abx", ["abc"]) == "abc"
    assert nearest("axx", ["abc"]) is None
    assert nearest("xexrxixg_xate", ["learning_rate", "seed"]) is None  # five
    assert nearest("wxrxup_xtxps", ["warmup_steps", "seed"]) == "warmup_steps"  # four of twelve


def test_no_name_that_edits_reach_is_passed_over_for_its_letters() -> None:
    draw = random.Random(11)
    for name in draw.sample(KNOWN, 12):
        word = list(name)
        for at in draw.sample(range(len(word)), min(2, len(name) // 3 or 1)):
            word[at] = draw.choice("abcdefghijklmnopqrstuvwxyz_")
        wrong = "".join(word)
        limits = {each: max(1, min(4, len(each) // 3)) for each in KNOWN}
        distances = {each: edit_distance(wrong, each) for each in KNOWN if abs(len(each) - len(wrong)) <= limits[each]}
        fewest = min(count for each, count in distances.items() if count <= limits[each])
        assert distances[nearest(wrong, KNOWN) or ""] == fewest


def test_the_nearest_name_is_the_one_of_fewest_edits_then_of_most_letters_in_common() -> None:
    assert nearest("lerning-RATE", ["learning_rate", "warning_rate"]) == "learning_rate"
    assert nearest("learning_rat", ["learning_rates", "learning_rate"]) == "learning_rate"
    assert nearest("cats", ["rats", "cat", "cots"]) == "cat"  # each one edit; 6/7 of the letters, else 3/4
    assert nearest("ab", ["ax", "bx"]) == "ax"
    assert nearest("abc", []) is None
    # Beyond a third of the letters only a text of much the same letters is near: 2 x 9 of 20.
    assert nearest("validation_prompt_lib", ["validation_prompt_library", "seed"]) == "validation_prompt_library"
    assert nearest("promptx_validation", ["validation_prompt"]) is None
    assert did_you_mean("sede", ["seed"]) == 'did you mean "seed"?'
    assert did_you_mean("zzz", ["seed"]) is None


def test_an_exchange_counts_once_between_neighbors_only() -> None:
    assert [edit_distance("abcd", word) for word in ("bacd", "badc", "cbad", "dbca", "abdc")] == [1, 2, 2, 2, 1]
    assert edit_distance("ca", "abc") == 3  # no letter is moved twice: optimal string alignment
