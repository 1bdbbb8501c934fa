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
def test_ten_thousand_mutated_files_do_no_harm_in_less_than_a_gigabyte(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "tests.fuzz", "--count", "10000", "--state", str(tmp_path / "state.json")]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    last = ended.stdout.strip().splitlines()[-1]
    assert ended.returncode == 0, f"{last}\n{ended.stderr[-2000:]}\n{(tmp_path / 'state.json').read_text()}"
    found = re.fullmatch(r"10000 cases, (\d+) MiB at most", last)
    assert found, last
    assert int(found[1]) < 1024
