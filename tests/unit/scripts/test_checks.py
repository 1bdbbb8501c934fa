"""The checks of a change: workflows and hooks call scripts that exist, and no system package is installed silently."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[3]
INSTALLER = "scripts/install_system_packages.sh"


def workflow_commands() -> list[str]:
    """The `run` lines of all workflows."""
    found = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
        found += [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    return found


def test_workflows_call_the_scripts_that_developers_call():
    commands = workflow_commands()
    assert {"tests/run quick", ".ci/run"} <= set(commands)
    for command in commands:
        script = ROOT / command.split()[0]
        assert os.access(script, os.X_OK), f"{command}: there is no such script"


@pytest.mark.parametrize("script", [".ci/run", "tests/run", "train.sh", "scripts/environment.sh"])
def test_nothing_calls_the_installer_of_system_packages(script: str):
    lines = (ROOT / script).read_text().splitlines()
    code = [line for line in lines if not line.lstrip().startswith(("#", "echo"))]
    assert [line for line in code if "apt-get" in line or "install_system_packages" in line] == []


@pytest.mark.parametrize(("answer", "arguments", "calls"), [("n\n", [], 0), ("y\n", [], 2), ("", ["--yes"], 2)])
def test_the_installer_says_what_it_installs_and_asks(tmp_path: Path, answer: str, arguments: list[str], calls: int):
    asked = tmp_path / "asked"
    for name, body in {"apt-get": f'echo "$@" >> {asked}', "sudo": '"$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    result = subprocess.run(
        [str(ROOT / INSTALLER), *arguments],
        input=answer,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert result.stdout.splitlines()[0] == "apt-get will install: chromium"
    assert result.returncode == (0 if calls else 1)
    assert len(asked.read_text().splitlines() if asked.exists() else []) == calls


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_an_issue_form_has_fields_with_labels(path: Path):
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("the adapter is trained", ""),
        ("the adaptor recieves gradients", "recieves ==> receives"),
        ("def mend_cache(): ...", "mend ==> fix"),
        ("# a cache that is Mended", "Mended ==> Fixed"),
    ],
)
def test_a_misspelled_and_a_banned_word_are_found_also_inside_of_names(tmp_path: Path, text: str, found: str):
    file = tmp_path / "module.py"
    file.write_text(f"{text}\n")
    result = subprocess.run([str(ROOT / "scripts/check_spelling.sh"), str(file)], capture_output=True, text=True)
    assert (result.returncode == 0) == (found == "")
    assert found in result.stdout


def test_each_banned_word_has_a_replacement_and_a_reason():
    lines = (ROOT / "scripts/banned_words.txt").read_text().splitlines()
    assert lines
    for line in lines:
        word, replacement, reason = line.replace("->", ",", 1).split(",")
        assert word.isalpha()
        assert replacement.strip()
        assert len(reason.split()) > 2
