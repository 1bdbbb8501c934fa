"""Commands that are printed: what a shell without an activated environment finds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from simpletuner import program as module
from simpletuner.cli.shared import app
from simpletuner.program import VERBS, pasteable, program


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in `.venv` of the working folder, which is not activated."""
    scripts = tmp_path / ".venv" / "bin"
    scripts.mkdir(parents=True)
    for name in ("simpletuner", "python"):
        (scripts / name).write_text("#!/bin/sh\n")
        (scripts / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(scripts / "python"))
    monkeypatch.setenv("PATH", "/nowhere")
    program.cache_clear()
    yield scripts
    program.cache_clear()


def test_every_verb_of_the_program_is_known_by_name() -> None:
    commands = {command.name or command.callback.__name__.replace("_", "-") for command in app.registered_commands}
    groups = {group.name for group in app.registered_groups}
    assert commands | groups == set(VERBS)


def test_what_is_not_on_the_path_is_called_by_its_place(environment: Path) -> None:
    assert program() == ".venv/bin/simpletuner"
    assert pasteable("`simpletuner options KEY` explains a key") == (
        "`.venv/bin/simpletuner options KEY` explains a key"
    )
    assert pasteable("CONFIG_PATH=a/config.json simpletuner train") == (
        "CONFIG_PATH=a/config.json .venv/bin/simpletuner train"
    )


def test_an_activated_environment_is_called_by_name(environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(environment))
    assert program() == "simpletuner"
    assert pasteable("simpletuner train") == "simpletuner train"


def test_another_installation_on_the_path_is_not_taken_for_this_one(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "simpletuner").write_text("#!/bin/sh\n")
    (other / "simpletuner").chmod(0o755)
    monkeypatch.setenv("PATH", str(other))
    assert program() == ".venv/bin/simpletuner"


def test_without_a_script_the_module_is_run(environment: Path) -> None:
    (environment / "simpletuner").unlink()
    assert program() == f"{sys.executable} -m simpletuner"
    assert pasteable(pasteable("simpletuner train")) == pasteable("simpletuner train")


@pytest.mark.parametrize(
    "text", ["/opt/simpletuner train", "my-simpletuner train", "simpletuner is a trainer", "simpletuner.yml check"]
)
def test_what_is_no_command_stays(environment: Path, text: str) -> None:
    assert pasteable(text) == text
    assert module.NAME == "simpletuner"
