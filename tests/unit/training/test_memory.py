"""The peak memory that is reported is that of this process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
