"""What a layer of the full-size OmniGen keeps stays what MEMORY and BENCHMARKS promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "kept_activations.py"


@pytest.mark.slow
def test_a_layer_keeps_residuals_attention_and_the_projection_into_the_mlp_alone() -> None:
    result = subprocess.run([sys.executable, str(FILE)], capture_output=True, text=True, check=True, timeout=300)
    found = json.loads(result.stdout.splitlines()[-1])
    # Input and middle 1 each; query, key and value 1 each; what attention makes 1; gate and up 2 * 8192 / 3072.
    assert found["widths"] == pytest.approx(6 + 2 * 8192 / 3072, abs=0.05)
    assert all(row["dtype"] == "bfloat16" for row in found["kept"] if row["widths"] > 0.05)
