"""The page that compares number formats shows what the benchmark measures."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from simpletuner.config.options import all_options
from simpletuner.config.rules.precision import EIGHT_BITS

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (`.*`) \| (true)? ?\| [\d.]+ \| (\S+).*? \| (\S+) % \| (\S+) % \|", re.MULTILINE)


def table() -> list[tuple[list[str], bool, list[float]]]:
    """(values, whether activations are quantized, per cents of weight, output and gradient) of each row."""
    text = (ROOT / "documentation" / "MEMORY.md").read_text(encoding="utf-8")
    rows = []
    for names, is_true, weight, *others in ROW.findall(text):
        numbers = [0.0 if weight == "none" else float(weight), *map(float, others)]
        rows.append((re.findall(r"`(.*?)`", names), bool(is_true), numbers))
    return rows


@pytest.mark.slow
def test_the_errors_of_every_format_are_those_that_are_measured() -> None:
    path = ROOT / "benchmarks" / "number_formats.py"
    spec = importlib.util.spec_from_file_location("number_formats", path)
    assert spec is not None
    assert spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = table()
    assert {name for names, _, _ in found for name in names} == set(all_options()["base_model_precision"].choices)
    assert {name for names, is_true, _ in found for name in names if is_true} == set(EIGHT_BITS)
    for names, is_true, numbers in found:
        for name in names:
            errors = [100 * error for error in benchmark.errors(name, is_true)]
            assert errors == pytest.approx(numbers, rel=0.12), name
