"""Which families the quick suite looks at here: one of each kind. The whole suite looks at all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from simpletuner.families.registry import FAMILIES

# An own denoiser that only tokenizes, a UNet that predicts noise, a transformer of flow, one that sees references.
QUICK = {"omnigen", "sdxl", "flux", "qwen_image_edit"}
HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        words = set(re.split(r"[\[\]-]", item.name))
        if HERE in item.path.parents and words & (FAMILIES.keys() - QUICK):
            item.add_marker(pytest.mark.slow)
