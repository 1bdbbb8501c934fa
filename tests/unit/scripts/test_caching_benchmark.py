"""The benchmark of caching runs, and encodes what it was asked to."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.mark.slow
def test_the_benchmark_of_caching_runs_on_a_few_images(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "caching", raising=False)
    benchmark = importlib.import_module("caching")
    words = ["--images=3", "--side=64", "--source-side=64", "--rounds=1", f"--threads={torch.get_num_threads()}"]
    assert benchmark.main([*words, "--goal=0"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["images"] == 3
    assert figures["build_per_second"] > 0
    assert figures["process_share"] > 0
