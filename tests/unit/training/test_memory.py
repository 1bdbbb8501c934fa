"""The peak memory that is reported is that of this process, and a limit is kept."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from simpletuner.hardware import GIB
from simpletuner.training import memory as process_memory
from simpletuner.training.memory import memory_gb, peak_bytes

MEBIBYTE = 2**20


def test_the_peak_is_what_was_held_even_after_it_is_let_go():
    before = peak_bytes()
    held = bytearray(b"x" * (300 * MEBIBYTE))
    assert len(held) == 300 * MEBIBYTE
    del held
    assert peak_bytes() >= max(before, 300 * MEBIBYTE)
    assert memory_gb(torch.device("cpu")) * 2**30 == peak_bytes()
    if sys.platform == "linux":
        [kibibytes] = re.findall(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        assert peak_bytes() >= int(kibibytes) * 1024


@pytest.mark.slow
def test_the_peak_of_a_program_is_not_that_of_the_process_that_started_it():
    held = bytearray(b"x" * (1024 * MEBIBYTE))
    code = "from simpletuner.training.memory import peak_bytes; print(peak_bytes())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(held) == 1024 * MEBIBYTE
    assert int(ended.stdout) < 900 * MEBIBYTE


def test_torch_may_take_no_more_of_a_gpu_than_was_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers of Windows would go on in main memory."""
    asked = []
    cuda = SimpleNamespace(
        mem_get_info=lambda device: (6 * GIB, 8 * GIB),
        set_per_process_memory_fraction=lambda share, device: asked.append(share),
    )
    monkeypatch.setattr(process_memory.torch, "cuda", cuda)
    process_memory.keep_within(6 * GIB, torch.device("cuda"))
    process_memory.keep_within(16 * GIB, torch.device("cuda"))
    assert asked == [0.75, 1.0]


def test_a_limit_on_the_cpu_gives_back_what_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(process_memory, "give_back_at_once", lambda: calls.append("given back"))
    process_memory.keep_within(1, torch.device("cpu"))
    assert calls == ["given back"]
