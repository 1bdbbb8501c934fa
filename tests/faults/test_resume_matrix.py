"""Each two choices of what trains, what moves it, where it dies, with an average or not, and in which processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import matrix

pytestmark = pytest.mark.ci


@pytest.mark.parametrize("row", matrix.pairwise(), ids=str)
def test_a_run_that_died_ends_with_the_same_bits(row: matrix.Combination, place: Path, model: Path) -> None:
    assert matrix.check(row, model, place) == []


@pytest.mark.parametrize("row", [row for row in matrix.refused() if row.moment == matrix.MOMENTS[0]], ids=str)
def test_what_a_library_cannot_do_is_refused(row: matrix.Combination, place: Path, model: Path) -> None:
    assert matrix.check(row, model, place) == []
