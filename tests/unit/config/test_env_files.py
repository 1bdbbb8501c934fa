"""`config.env` beside a configuration, and the variables of launch scripts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simpletuner.config.env_files import variables_of_files
from simpletuner.errors import ConfigError
from tests.runs import run_cli, write_run

from .conftest import Workspace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for place, text in (("config", "A=1\nB='two words'\n"), ("config/luna", "export B=3\nC=$B\n")):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text("{}")
        (tmp_path / place / "config.env").write_text(text)
    return tmp_path


def test_the_folder_of_the_chosen_configuration_comes_last(folder: Path):
    assert variables_of_files({}, folder) == {"A": "1", "B": "two words"}
    expected = {"A": "1", "B": "3", "C": "3"}
    assert variables_of_files({}, folder, "luna") == expected
    for key in ("ENV", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT"):
        assert variables_of_files({key: "luna"}, folder) == expected


def test_variables_that_the_file_does_not_set_come_from_the_environment(folder: Path):
    (folder / "config/config.env").write_text('A=$HOME/runs\nD="${A} and ${NOWHERE}"\n')
    found = variables_of_files({"HOME": "/home/ann"}, folder)
    assert found == {"A": "/home/ann/runs", "D": "/home/ann/runs and "}
    (folder / "config/config.json").unlink()
    text = "MODEL_FAMILY=toy\nMAX_NUM_STEPS=5\nOUTPUT_DIR=$HOME/runs\nDATALOADER_CONFIG=data.json\nMODEL_TYPE=full\n"
    (folder / "config/config.env").write_text(text)
    (folder / "data.json").write_text('[{"id": "a", "instance_data_dir": "."}]')
    run = Workspace(folder, environment={"HOME": "/home/ann"}).load(check_files=False)
    assert run.config.output_dir == Path("/home/ann/runs")


def test_config_env_may_choose_the_configuration(folder: Path):
    (folder / "config/config.env").write_text("ENV=luna\n")
    assert variables_of_files({}, folder) == {"ENV": "luna", "B": "3", "C": "3"}


def test_the_environment_itself_wins(folder: Path):
    assert variables_of_files({"B": "mine"}, folder, "luna") == {"A": "1", "C": "3"}


def test_a_config_env_that_is_the_configuration_is_not_read_twice(folder: Path):
    (folder / "config/config.json").unlink()
    assert variables_of_files({}, folder) == {}


def test_a_line_that_is_no_assignment_is_placed(folder: Path):
    (folder / "config/config.env").write_text("A=1\nrm -rf x\n")
    with pytest.raises(ConfigError, match="not an assignment") as raised:
        variables_of_files({}, folder)
    assert (raised.value.problems[0].file, raised.value.problems[0].line) == ("config/config.env", 2)


@pytest.mark.slow
def test_the_command_sets_them_before_it_reads_the_configuration(tmp_path: Path, omnigen_folder: Path):
    write_run(tmp_path / "config", omnigen_folder)
    (tmp_path / "config/config.env").write_text("SIMPLETUNER_SEED=77\n")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SIMPLETUNER_")}
    told = run_cli(tmp_path, "options", "--resolved", environment=kept).stdout
    [line] = [line for line in told.splitlines() if line.startswith("  seed ")]
    assert "77" in line
    assert "SIMPLETUNER_SEED" in line
    refused = run_cli(tmp_path, "options", "--resolved", environment=kept | {"SIMPLETUNER_LOG_LEVEL": "loud"})
    assert (refused.returncode, "debug, info" in refused.stderr) == (2, True)


def test_variables_of_launch_scripts_act_or_are_told(workspace: Workspace):
    workspace.environment = {"MIXED_PRECISION": "no", "ACCELERATE_CONFIG_PATH": "x.yaml"}
    run = workspace.load_written()
    assert run.config.mixed_precision == "no"
    assert any("ACCELERATE_CONFIG_PATH: is not read" in line for line in run.warnings)
