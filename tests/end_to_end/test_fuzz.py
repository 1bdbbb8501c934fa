"""Mutated files of every kind are taken, or refused with an error for the user; see `tests/fuzz.py`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_some_mutated_files_do_no_harm(kind: str) -> None:
    fuzz.run_part(kind, range(20))


def test_a_case_that_fails_is_named_and_the_same_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path, numbers: range) -> None:
        for number in numbers:
            with fuzz.case("tables", number):
                if fuzz.mutate(b"sound", fuzz.rng_of("tables", number)) == found:
                    raise KeyError("text")

    found = fuzz.mutate(b"sound", fuzz.rng_of("tables", 7))
    monkeypatch.setitem(fuzz.KINDS, "tables", broken)
    with pytest.raises(fuzz.Failed, match=r"tables/7: KeyError: 'text'"):
        fuzz.run_part("tables", range(20))


@pytest.mark.ci
@pytest.mark.timeout(1800)
def test_ten_thousand_mutated_files_do_no_harm_in_less_than_a_gigabyte(tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    words = [sys.executable, "-m", "tests.fuzz", "--count", "10000", "--state", str(state)]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    # Libraries may print after the last line of the program.
    found = re.search(r"^10000 cases, (\d+) MiB at most$", ended.stdout, re.MULTILINE)
    mebibytes = int(found[1]) if found else None
    if ended.returncode or mebibytes is None or mebibytes >= 1024:
        done = state.read_text() if state.exists() else "nothing"
        said = f"it said {ended.stdout.strip()[-300:]!r}, stderr {ended.stderr[-300:]!r}"
        # All in one line: it is what the summary of a long test run shows.
        pytest.fail(f"code {ended.returncode}, {mebibytes} MiB, done {done}, {said}\n{ended.stderr[-4000:]}")
