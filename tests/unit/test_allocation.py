"""What the system sees of memory that is freed and asked for again, counted by the system itself."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from simpletuner import allocation
from simpletuner.cli import program

PAGES = 30 * (16 << 20) // 4096  # of all tensors
# A process of its own, since glibc's settings hold for all of it. Ten times three tensors of 16 MiB, as layers make
# them: two are there at any time.
COUNT = """
import resource, sys
import torch
from simpletuner.allocation import give_back_at_once, keep_freed_memory
{"kept": keep_freed_memory, "back": give_back_at_once, "both": lambda: (keep_freed_memory(), give_back_at_once())}[
    sys.argv[1]
]()
def layers():
    hidden = torch.ones(4 << 20)
    for _ in range(2):
        hidden = hidden + 1
for _ in range(3):
    layers()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    layers()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

on_glibc = pytest.mark.skipif(sys.platform != "linux", reason="glibc only")


def pages_taken(way: str) -> int:
    words = [sys.executable, "-c", COUNT, way]
    return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@on_glibc
def test_freed_memory_is_taken_again_without_asking_the_system() -> None:
    """But for a few: older versions of glibc do not find a freed piece of the same size for aligned memory."""
    assert pages_taken("kept") < PAGES / 4


@on_glibc
@pytest.mark.parametrize("way", ["back", "both"])
def test_what_is_given_back_at_once_is_asked_for_again(way: str) -> None:
    """Also where it was kept before: a limit (`memory`) is set after the program has begun."""
    assert pages_taken(way) >= PAGES


def test_the_settings_are_those_of_malloc_h(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    libc = SimpleNamespace(mallopt=lambda *given: calls.append(given))
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(allocation.sys, "platform", "linux")
    allocation.keep_freed_memory()
    allocation.give_back_at_once()
    # M_MMAP_THRESHOLD is -3, and at most half of a thread's heap; M_TRIM_THRESHOLD is -1.
    assert calls == [(-3, 32 << 20), (-1, 256 << 20), (-3, 1 << 20), (-1, 128 << 10)]


def test_every_command_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(program, "keep_freed_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(program, "app", lambda: calls.append("command"))
    program.main()
    assert calls == ["kept", "command"]


def test_elsewhere_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation.sys, "platform", "darwin")
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: pytest.fail("asked for the C library"))
    allocation.keep_freed_memory()
