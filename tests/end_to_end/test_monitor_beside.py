"""`simpletuner train --monitor`: a page of its own process that follows the run and ends with it, however it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from simpletuner.commands.monitor import monitor_beside

pytestmark = pytest.mark.slow


def free_port() -> int:
    """None that the system would give to another server meanwhile: those begin at 32768."""
    for port in range(20_000 + os.getpid() % 1000 * 10, 32_768):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5) as response:
            return response.status == 200
    except (urllib.error.URLError, ConnectionError):
        return False


def until(port: int, expected: bool) -> None:
    for _ in range(300):
        if answers(port) is expected:
            return
        time.sleep(0.1)
    raise AssertionError(f"the page is {'not ' if expected else 'still '}there")


def test_the_page_is_there_while_the_run_trains_and_gone_after_it(tmp_path: Path) -> None:
    port = free_port()
    with monitor_beside(tmp_path / "output", port):
        until(port, True)
    assert not answers(port)


def test_a_port_that_is_taken_costs_the_run_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with monitor_beside(tmp_path / "output", port):
            said = ""
            for _ in range(300):
                said += capfd.readouterr().out
                if "open http://localhost:" in said:
                    break
                time.sleep(0.1)
            other = int(re.search(r"localhost:(\d+)/", said)[1])
            assert other != port
            until(other, True)


def test_a_killed_run_takes_its_page_with_it(tmp_path: Path) -> None:
    port = free_port()
    code = (
        "import time; from pathlib import Path; from simpletuner.commands.monitor import monitor_beside\n"
        f"with monitor_beside(Path({json.dumps(str(tmp_path))}), {port}): time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        until(port, True)
        os.kill(process.pid, signal.SIGKILL)
        until(port, False)
    finally:
        process.kill()
        process.wait()
