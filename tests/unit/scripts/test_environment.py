"""train.sh and tests/run make their environment in one way; here with a Python that only notes what it is asked."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parents[3]

FAKE_PYTHON = """#!/bin/bash
# Makes a venv whose python notes its arguments and whose simpletuner prints them.
case "$1" in
    -c) exit 0 ;;
    --version) echo "Python 3.99" ;;
    -m)
        mkdir -p "$3/bin"
        printf '#!/bin/bash\\necho "$@" >> "%s/asked"\\n' "$3" > "$3/bin/python"
        printf '#!/bin/bash\\necho "ran $@"; exec sleep "${NAP:-0}"\\n' > "$3/bin/simpletuner"
        chmod +x "$3/bin/python" "$3/bin/simpletuner"
        ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with train.sh, its parts, and the fake Python."""
    root = tmp_path / "a clone"
    (root / "scripts").mkdir(parents=True)
    for name in ("train.sh", "scripts/environment.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(CLONE / name, root / name)
    (root / "fake-python").write_text(FAKE_PYTHON)
    (root / "fake-python").chmod(0o755)
    return root


def start(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {"PATH": os.environ["PATH"], "PYTHON": str(root / "fake-python"), **environment}
    return subprocess.run(
        [str(root / "train.sh"), *arguments], env=settings, capture_output=True, text=True, check=False
    )


def installs(root: Path) -> list[str]:
    asked = root / ".venv" / "asked"
    return [line for line in asked.read_text().splitlines() if "pip install" in line] if asked.exists() else []


def test_the_first_start_installs_pinned_and_passes_arguments_on(clone: Path):
    result = start(clone, "--max_train_steps=5", "--validation_prompt", "two words")
    assert result.returncode == 0
    assert result.stdout.splitlines()[-1] == "ran train --max_train_steps=5 --validation_prompt two words"
    [line] = installs(clone)
    assert f"--constraint {clone}/constraints.txt --editable {clone}" in line


def test_a_second_start_installs_nothing_until_the_pins_change(clone: Path):
    start(clone)
    result = start(clone)
    assert result.stdout.splitlines() == ["ran train"]
    assert len(installs(clone)) == 1
    with (clone / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    start(clone)
    assert len(installs(clone)) == 2


def test_extras_are_installed_once_each(clone: Path):
    for extras in ("", "cuda", "", "cuda"):
        start(clone, EXTRAS=extras)
    assert [line.rpartition("--editable ")[2] for line in installs(clone)] == [str(clone), f"{clone}[cuda]"]


def test_an_install_that_failed_is_tried_again(clone: Path):
    start(clone)
    (clone / ".venv" / ".simpletuner-installed").unlink()
    (clone / ".venv" / "bin" / "python").write_text("#!/bin/bash\nexit 1\n")
    assert start(clone).returncode != 0
    assert not (clone / ".venv" / ".simpletuner-installed").exists()


def test_without_a_python_that_is_new_enough_it_says_what_to_do(clone: Path, tmp_path: Path):
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "cat", "cksum", "tr", "dirname", "env", "grep"):
        (tools / tool).symlink_to(shutil.which(tool) or pytest.skip(f"no {tool}"))
    result = start(clone, PATH=str(tools), PYTHON="no-such-python")
    assert result.returncode == 2
    assert "Python 3.11 or newer" in result.stderr


def test_a_signal_reaches_the_program_itself(clone: Path):
    start(clone)
    settings = {"PATH": os.environ["PATH"], "NAP": "600"}
    process = subprocess.Popen([str(clone / "train.sh")], env=settings, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ran train\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=300) == -signal.SIGTERM
    process.stdout.close()
