"""`scripts/same_results.py`: a change of a number, a key or a file is named, and equal runs are equal."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import same_results


def row(*, loss: float = 0.5, key_digest: str = "a1", files: tuple[str, ...] = ("output/loss.png",)) -> dict[str, Any]:
    return {
        "exit": [0],
        "metrics": {"step_done.1.loss": loss, "step_done.1.extra": {}},
        "tensors": {"output/weights.safetensors": {"keys": key_digest, "numbers": "b2"}},
        "files": list(files),
    }


def test_equal_rows_have_no_difference():
    assert same_results.differences(row(), row()) == []


@pytest.mark.parametrize(
    ("after", "line"),
    [
        (row(loss=0.5000001), "metrics > step_done.1.loss: 0.5 -> 0.5000001"),
        (row(key_digest="c3"), "tensors > output/weights.safetensors > keys: a1 -> c3"),
        (row(files=()), "files > output/loss.png: is there -> missing"),
        (row(files=("output/loss.png", "output/new.json")), "+ files > output/new.json: is there"),
    ],
)
def test_a_changed_number_key_or_file_is_named(after: dict[str, Any], line: str):
    assert same_results.differences(row(), after) == [line]


def test_the_rows_that_differ_are_counted_and_printed(capsys: pytest.CaptureFixture[str]):
    before = {"sdxl/lora/plain": row(), "sdxl/lora/ema": row()}
    after = {"sdxl/lora/plain": row(), "sdxl/lora/ema": row(loss=0.25), "new/lora/plain": row()}
    assert same_results.compare(before, after) == 1
    assert capsys.readouterr().out.splitlines() == [
        "sdxl/lora/ema",
        "    metrics > step_done.1.loss: 0.5 -> 0.25",
        "new/lora/plain: not in the earlier file",
        "1 of 2 rows are equal",
    ]


@pytest.mark.ci
def test_two_calls_of_the_quick_rows_are_equal(tmp_path: Path):
    script = [sys.executable, same_results.__file__, "--quick"]
    first = subprocess.run(script, capture_output=True, text=True, check=True)
    before = json.loads(first.stdout)
    assert list(before) == list(same_results.QUICK)
    assert all(set(facts["exit"]) == {0} for facts in before.values())
    extras = [value for name, value in before["flux/dora/regularization"]["metrics"].items() if name.endswith("extra")]
    assert any("regularisation_loss" in extra for extra in extras), "no step was of the regularization dataset"
    (tmp_path / "before.json").write_text(first.stdout)
    again = subprocess.run([*script, "--compare", str(tmp_path / "before.json")], capture_output=True, text=True)
    assert again.stdout.splitlines() == ["8 of 8 rows are equal"]
