"""The benchmark that needs a GPU runs: on a tiny shape, on the processor, every row of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "full_size.py"
ROWS = [
    "plain",
    "recomputed to fit 15.5 GiB",
    "int8 all blocks swapped",
]


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("full_size", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["full_size"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_rows_run_on_a_tiny_shape(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main(["--tiny", "--rows", ",".join(ROWS)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(found["rows"]) == ROWS
    assert all(row["seconds"] > 0 and row["trained"] > 0 for row in found["rows"].values())


@pytest.mark.ci
def test_every_row_runs_on_a_tiny_shape(benchmark: ModuleType) -> None:
    assert benchmark.main(["--tiny"]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to measure here")
def test_without_a_gpu_it_says_so(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().out


def test_the_full_shape_is_the_released_one(benchmark: ModuleType) -> None:
    from diffusers.models.transformers.transformer_omnigen import OmniGenTransformer2DModel

    with torch.device("meta"):
        model = OmniGenTransformer2DModel(
            pad_token_id=32000,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            **benchmark.FULL,
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_762_072_592


def test_a_missed_goal_is_seen(benchmark: ModuleType) -> None:
    row = benchmark.ROWS["recomputed to fit 15.5 GiB"]
    assert not benchmark.is_missed(row, {"seconds": 0.29, "peak_gib": 13.9})
    assert benchmark.is_missed(row, {"seconds": 0.31, "peak_gib": 13.9})
    assert benchmark.is_missed(row, {"seconds": 0.29, "peak_gib": 14.1})
    assert benchmark.is_missed(row, {"error": "out of memory"})
    assert not benchmark.is_missed(benchmark.ROWS["compiled"], {"error": "out of memory"})


def test_a_row_that_fails_or_hangs_says_so_and_ends_no_other(benchmark: ModuleType) -> None:
    def row(code: str, timeout: float = 60) -> dict:
        return benchmark.in_its_own_process([sys.executable, "-c", code], timeout)

    assert row("print('noise'); print('{\"seconds\": 0.2}')") == {"seconds": 0.2}
    assert row("raise MemoryError('out of memory')") == {"error": "MemoryError: out of memory"}
    assert row("import os; os._exit(9)") == {"error": "ended with 9 and without a word"}
    assert row("import time; time.sleep(60)", timeout=1) == {"error": "took longer than 1 s"}


def test_every_row_has_a_name_that_can_be_asked_for(benchmark: ModuleType) -> None:
    assert benchmark.parse([]).names == list(benchmark.ROWS)
    assert len(benchmark.ROWS) == 13
