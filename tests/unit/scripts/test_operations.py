"""Operations of a training step, counted beside diffusers with PEFT: at the same memory never more than theirs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import operations

    yield operations
    for name in ("operations", "public_models", "gpu_rows"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("recomputes", [False, True], ids=["plain", "recomputed"])
@pytest.mark.parametrize("family", ["flux", "omnigen"])
def test_a_step_asks_for_no_more_operations_than_the_public_modules(
    operations: Any, family: str, recomputes: bool
) -> None:
    """What is done once a step counts fully here: with two blocks of each kind no block can hide it."""
    from gpu_rows import TINY
    from public_models import FLUX_TINY

    shape = FLUX_TINY if family == "flux" else TINY | {"pos_embed_max_size": 64}
    found = operations.compare(family, "lora", recomputes, shape)
    assert 100 < found["plain"] <= found["published"]
