"""A finished run, its record of operations, and the state that each fault starts from."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.cases import Scene
from tests.memory_folder import memory_folder
from tests.tiny import tiny_omnigen_folder


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder in memory where there is one: fsync then costs nothing."""
    folder = Path(tempfile.mkdtemp(prefix="simpletuner-faults-", dir=memory_folder()))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def model(place: Path) -> Path:
    return tiny_omnigen_folder(place / "model")


@pytest.fixture(scope="module")
def scene(place: Path, model: Path) -> Scene:
    """Of a run whose caches are complete."""
    return Scene(place / "cached", model, is_cached=True)


@pytest.fixture(scope="module")
def first_scene(place: Path, model: Path) -> Scene:
    """Of a run that has nothing yet."""
    return Scene(place / "first", model, is_cached=False)


@pytest.fixture(scope="module")
def rotating_scene(place: Path, model: Path) -> Scene:
    """Of a run that keeps two checkpoints: the oldest goes once a third is committed, not after its first good step."""
    return Scene(place / "rotating", model, is_cached=True, max_train_steps=3, checkpoints_total_limit=2)
