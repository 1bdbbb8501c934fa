"""Each fault that RELIABILITY.md lists has a test that exists, or a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
PAGE = TESTS.parent / "documentation" / "RELIABILITY.md"
ROWS = [line.strip("|").split(" | ") for line in PAGE.read_text().splitlines() if re.match(r"\| \d+ \|", line)]
FAULTS = 108


def test_every_fault_is_there_once_and_in_order() -> None:
    assert [int(row[0]) for row in ROWS] == list(range(1, FAULTS + 1))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip())
def test_a_fault_has_a_test_that_exists_or_a_reason(row: list[str]) -> None:
    _, fault, _, proof = row
    named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", proof)
    if not named:
        assert len(proof.split()) > 5, f"{fault}: no test and no reason"
    for file, name in named:
        assert f"def {name}(" in (TESTS / file).read_text(), f"{fault}: {file} has no {name}"
