"""Settings for all tests: one thread, and no network."""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.memory_folder import memory_folder

os.environ["OMP_NUM_THREADS"] = "1"  # tests fork, and the threads of OpenMP do not come along
os.environ["HF_HUB_OFFLINE"] = "1"
if (folder := memory_folder()) is not None:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", folder)
# Each run notes nineteen of them, and to read one takes milliseconds.
importlib.metadata.version = functools.cache(importlib.metadata.version)
gc.disable()  # until all tests are imported: each collection would look at all modules again


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ci", action="store_true", help="also run the long tests marked ci")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--ci"):
        return
    for item in items:
        if "ci" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="long: runs with --ci"))


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end: the garbage collector looks only at what tests make."""
    gc.freeze()
    gc.set_threshold(20_000)  # Python's 700 is reached by a part of a tiny model
    gc.enable()


@pytest.fixture(autouse=True)
def plain_messages() -> Iterator[None]:
    """No problem or notice that a test provokes shows Python, a digest or a number of bytes."""
    from tests.messages import faults_of, recorded_messages

    with recorded_messages() as seen:
        yield
    for text in dict.fromkeys(seen):  # a test of bounded memory says the same thousands of times
        assert not faults_of(text), f"the message shows {', '.join(faults_of(text))}: {text}"


@pytest.fixture(scope="session")
def omnigen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random OmniGen in diffusers layout, made once; do not write into it."""
    from tests.tiny import tiny_omnigen_folder

    return tiny_omnigen_folder(tmp_path_factory.mktemp("omnigen"))
