"""Tests that need an accelerator; elsewhere all of them are skipped. One command: `tests/run tests/gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no accelerator here"))


@pytest.fixture(autouse=True)
def _own_memory() -> Iterator[None]:
    """Each test begins with an empty cache, and leaves limits and modes as they were."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.set_per_process_memory_fraction(1.0)
