"""What the blocks of full-size models keep stays what MEMORY and BENCHMARKS promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "kept_activations.py"
GIB = 2**30


@pytest.mark.slow
def test_a_block_keeps_its_input_its_middle_what_attention_needs_and_the_projection_into_the_mlp() -> None:
    command = [sys.executable, str(FILE), "flux", "omnigen"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    flux, omnigen = json.loads(result.stdout.splitlines()[-1])["rows"]
    # Tensors of the hidden width: query, key and value, what attention makes, input; middle; four of the projection.
    widths = 19 * (3 + 1 + 1 + 1 + 4) + 38 * (3 + 1 + 1 + 4)
    assert flux["ours_gib"] == pytest.approx(widths * (4096 + 512) * 3072 * 2 / GIB, rel=0.01)
    assert flux["ratio"] < 0.66
    # Its gate and up are one projection of 2 * 8192; tokens of 300 ids, one time, 4096 patches.
    widths = 32 * (3 + 1 + 1 + 1 + 2 * 8192 / 3072)
    assert omnigen["ours_gib"] == pytest.approx(widths * (300 + 1 + 4096) * 3072 * 2 / GIB, rel=0.01)
