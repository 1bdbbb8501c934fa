"""`config.env` beside a configuration, and the variables of launch scripts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from simpletuner.config.env_files import variables_of_files
from simpletuner.config.layers import read_env_variables
from simpletuner.distributed.lifeline import LAST_WORDS, LIFELINE
from simpletuner.errors import ConfigError
from simpletuner.spelling import edit_distance
from tests.runs import run_cli, write_run

from .conftest import Workspace


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    texts = {"config": "HF_HOME=1\nWANDB_NOTES='two words'\n", "config/luna": "export WANDB_NOTES=3\nTZ=$WANDB_NOTES\n"}
    for place, text in texts.items():
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text("{}")
        (tmp_path / place / "config.env").write_text(text)
    return tmp_path


def test_the_folder_of_the_chosen_configuration_comes_last(folder: Path):
    assert variables_of_files({}, folder).variables == {"HF_HOME": "1", "WANDB_NOTES": "two words"}
    expected = {"HF_HOME": "1", "WANDB_NOTES": "3", "TZ": "3"}
    assert variables_of_files({}, folder, "luna").variables == expected
    for key in ("ENV", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT"):
        assert variables_of_files({key: "luna"}, folder).variables == expected


def test_variables_that_the_file_does_not_set_come_from_the_environment(folder: Path):
    text = 'MINE=$HOME/runs\nHF_HOME="${MINE} and ${NOWHERE}"\nSIMPLETUNER_SEED=3\nDISCORD_WEBHOOK_URL=x\n'
    (folder / "config/config.env").write_text(text)
    found = variables_of_files({"HOME": "/home/ann"}, folder)
    expected = {"HF_HOME": "/home/ann/runs and ", "SIMPLETUNER_SEED": "3", "DISCORD_WEBHOOK_URL": "x"}
    assert (found.variables, found.warnings) == (expected, [])  # MINE is for the file alone
    (folder / "config/config.json").unlink()
    text = "MODEL_FAMILY=toy\nMAX_NUM_STEPS=5\nOUTPUT_DIR=$HOME/runs\nDATALOADER_CONFIG=data.json\nMODEL_TYPE=full\n"
    (folder / "config/config.env").write_text(text)
    (folder / "data.json").write_text('[{"id": "a", "instance_data_dir": "."}]')
    run = Workspace(folder, environment={"HOME": "/home/ann"}).load(check_files=False)
    assert run.config.checkpoint.output_dir == Path("/home/ann/runs")


def test_the_second_file_may_use_what_the_first_one_sets(folder: Path):
    (folder / "config/luna/config.env").write_text("WANDB_NOTES=$HF_HOME/luna\n")
    assert variables_of_files({}, folder, "luna").variables == {"HF_HOME": "1", "WANDB_NOTES": "1/luna"}


def test_config_env_may_choose_the_configuration(folder: Path):
    (folder / "config/config.env").write_text("ENV=luna\n")
    assert variables_of_files({}, folder).variables == {"ENV": "luna", "WANDB_NOTES": "3", "TZ": "3"}


def test_the_environment_itself_wins(folder: Path):
    assert variables_of_files({"WANDB_NOTES": "mine"}, folder, "luna").variables == {"HF_HOME": "1", "TZ": "3"}


def test_a_config_env_that_is_the_configuration_is_not_read_twice(folder: Path):
    (folder / "config/config.json").unlink()
    assert variables_of_files({}, folder).variables == {}


LOADS_CODE = [
    *("PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PYTHONBREAKPOINT", "LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT"),
    *("DYLD_INSERT_LIBRARIES", "PATH", "BASH_ENV", "CC", "CXX", "CUDA_HOME", "CUDA_INJECTION64_PATH", "GCONV_PATH"),
    *("NCCL_NET_PLUGIN", "NCCL_TUNER_PLUGIN", "NCCL_CONF_FILE", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"),
    *("TORCH_EXTENSIONS_DIR", "GIT_SSH_COMMAND", "HF_MODULES_CACHE", "WANDB_EXECUTABLE", "BROWSER"),
    *("MALLOC_CONF", "GLIBC_TUNABLES", "OMP_TOOL_LIBRARIES", "HSA_TOOLS_LIB", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"),
    *("LOCAL_KERNELS", "PERL5LIB", "AWS_DATA_PATH"),
]
MOVES_TOKENS = [
    *("HF_ENDPOINT", "HTTP_PROXY", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "no_proxy", "NETRC"),
    *("HF_TOKEN_PATH", "WANDB_BASE_URL", "WANDB_X_EXTRA_HTTP_HEADERS", "WANDB_HTTPS_PROXY", "AWS_ENDPOINT_URL_S3"),
    *("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "AWS_CONFIG_FILE", "HF_INFERENCE_ENDPOINT"),
    *("HF_XET_CAS_URL", "WANDB_APP_URL", "AWS_CONTAINER_CREDENTIALS_FULL_URI", "HUGGINGFACE_CO_STAGING"),
    *("HF_STORED_TOKENS_PATH", "AWS_WEB_IDENTITY_TOKEN_FILE", "WANDB_CREDENTIALS_FILE", "SSLKEYLOGFILE"),
]


@pytest.mark.parametrize("name", LOADS_CODE + MOVES_TOKENS)
def test_what_loads_code_or_moves_tokens_is_refused_by_name(folder: Path, name: str):
    (folder / "config/config.env").write_text(f"HF_HOME=1\n{name}=/tmp/x\n")
    with pytest.raises(ConfigError) as caught:
        variables_of_files({}, folder)
    (problem,) = caught.value.problems
    assert (problem.key, problem.file, problem.line) == (name, "config/config.env", 2)
    assert ("load code" if name in LOADS_CODE else "send tokens") in problem.message
    assert problem.fix == f"set it in the shell: export {name}=..."


def test_what_is_not_listed_is_not_set_and_says_so(folder: Path):
    (folder / "config/config.env").write_text(
        f"SOME_LIBRARY_THING=1\nHF_HOME=2\nLEARNING_RATE=1\n{LAST_WORDS}=/x\n{LIFELINE}=3\n"
    )
    found = variables_of_files({}, folder)
    assert found.variables == {"HF_HOME": "2"}
    assert [line.split(" is not set")[0] for line in found.warnings] == [
        "config/config.env:1: SOME_LIBRARY_THING",
        "config/config.env:3: LEARNING_RATE",
        f"config/config.env:4: {LAST_WORDS}",  # what processes of one run tell each other
        f"config/config.env:5: {LIFELINE}",
    ]


def test_text_is_not_run_and_ends_no_line_where_it_does_not(folder: Path):
    for command in ("$(touch x)", "`touch x`"):
        (folder / "config/config.env").write_text(f"HF_HOME={command}\n")
        with pytest.raises(ConfigError, match="holds a command, which is not run"):
            variables_of_files({}, folder)
    (folder / "config/config.env").write_text("WANDB_NOTES='costs $TZ'\" in $TZ\"\n")
    assert variables_of_files({"TZ": "UTC"}, folder).variables == {"WANDB_NOTES": "costs $TZ in UTC"}
    (folder / "config/config.env").write_text("WANDB_NOTES='a\u2028LD_PRELOAD=x'\n", encoding="utf-8")
    assert variables_of_files({}, folder).variables == {"WANDB_NOTES": "a\u2028LD_PRELOAD=x"}


def test_a_line_that_is_no_assignment_is_placed(folder: Path):
    (folder / "config/config.env").write_text("HF_HOME=1\nrm -rf x\n")
    with pytest.raises(ConfigError, match="not an assignment") as raised:
        variables_of_files({}, folder)
    assert (raised.value.problems[0].file, raised.value.problems[0].line) == ("config/config.env", 2)


@pytest.mark.slow
def test_the_command_sets_them_before_it_reads_the_configuration(tmp_path: Path, omnigen_folder: Path):
    write_run(tmp_path / "config", omnigen_folder)
    (tmp_path / "config/config.env").write_text("SIMPLETUNER_SEED=77\n")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SIMPLETUNER_")}
    reported = run_cli(tmp_path, "options", "--resolved", environment=kept).stdout
    [line] = [line for line in reported.splitlines() if line.startswith("  seed ")]
    assert "77" in line
    assert "SIMPLETUNER_SEED" in line
    refused = run_cli(tmp_path, "options", "--resolved", environment=kept | {"SIMPLETUNER_LOG_LEVEL": "loud"})
    assert (refused.returncode, "debug, info" in refused.stderr) == (2, True)


def test_variables_of_launch_scripts_act_or_are_reported(workspace: Workspace):
    workspace.environment = {"MIXED_PRECISION": "no", "ACCELERATE_CONFIG_PATH": "x.yaml"}
    run = workspace.load_written()
    assert run.config.precision.mixed_precision == "no"
    assert any("ACCELERATE_CONFIG_PATH: is not read" in line for line in run.warnings)


def test_text_that_is_added_stands_behind_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "config.env"
    path.write_text('A="one"\nA+=" two"\nB+=three\n')
    found = {name: value for name, (value, _) in read_env_variables(path, "config.env", {}).items()}
    assert found == {"A": "one two", "B": "three"}


@pytest.mark.parametrize(
    ("a", "b", "edits"),
    [
        ("rate", "rate", 0),
        ("rate", "raet", 1),
        ("rate", "rte", 1),
        ("rate", "raate", 1),
        ("rate", "kite", 2),
        ("", "ab", 2),
    ],
)
def test_edits_between_two_names_by_hand(a: str, b: str, edits: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == edits
