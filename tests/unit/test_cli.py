"""The command line: start-up time, exit codes, suggestions for misspelled words."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from simpletuner import __version__, cli
from simpletuner.cli.shared import say_for_all
from simpletuner.distributed.lifeline import LIFELINE
from simpletuner.errors import DataError, Interrupted, Problem
from tests.costs import calls_in_program
from tests.exit_codes import exit_code_of

PROGRAM = [sys.executable, "-c", "from simpletuner.cli import main; main()"]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Calls the command line in an empty folder; returns exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("CONFIG_PATH", "ENV", "SIMPLETUNER_ENV", "SIMPLETUNER_ENVIRONMENT", "SIMPLETUNER_DEBUG"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["simpletuner", *arguments])
        code = exit_code_of(cli.main)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_help_takes_few_calls():
    """A seventh of a second of CPU time; with torch it would be millions."""
    calls, reported = calls_in_program("from simpletuner.cli import main; main()", "--help")
    assert calls < 250_000
    assert all(verb in reported for verb in ("train", "options", "generate", "examples"))


@pytest.mark.parametrize("arguments", [["--help"], ["examples", "list"], ["options", "learning_rate"]])
def test_quick_verbs_import_no_torch(arguments: list[str]):
    program = (
        "import sys; from simpletuner.cli import app; app(sys.argv[1:], standalone_mode=False)\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_the_version_is_the_package_s(run):
    assert run("--version") == (0, f"simpletuner {__version__}\n", "")


def test_a_misspelled_verb_ends_with_a_suggestion(run):
    code, _, errors = run("trian")  # codespell:ignore
    assert code == 2
    assert "train" in errors


def test_a_misspelled_option_of_a_run_is_a_configuration_error_without_traceback(run):
    code, _, errors = run("train", "example=omnigen-tiny", "--learning_rat=1e-4")
    assert code == 2
    assert 'did you mean "learning_rate"?' in errors
    assert "Traceback" not in errors


def test_an_option_without_dashes_is_explained(run):
    code, _, errors = run("train", "learning_rate=1e-4")
    assert code == 2
    assert "--learning_rate=1e-4" in errors


def test_without_any_configuration_the_example_is_used_and_said(run):
    code, out, _ = run("train", "--learning_rat=1e-4")
    assert code == 2
    assert "using the shipped example omnigen-tiny" in out


def test_resolved_options_show_a_value_from_the_command_line_and_its_origin(run):
    code, out, errors = run("options", "--resolved", "example=omnigen-tiny", "--learning_rate=0.125")
    assert (code, errors) == (0, "")
    [line] = [line for line in out.splitlines() if line.split()[:1] == ["learning_rate"]]
    assert "0.125" in line
    assert "command line" in line


def test_the_json_schema_is_json(run):
    code, out, _ = run("options", "--json-schema")
    assert code == 0
    assert "learning_rate" in json.loads(out)["properties"]


def test_an_option_is_explained_by_name(run):
    code, out, _ = run("options", "lr_warmup_steps")
    assert code == 0
    assert "lr_warmup_steps" in out


def test_generate_takes_a_model_or_a_configuration_but_not_both(run):
    code, _, errors = run("generate", "--prompt", "a cat", "--model", "somewhere", "--seed=3", "example=omnigen-tiny")
    assert code == 2
    assert "--model" in errors


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            DataError(Problem("no images", key="instance_data_dir", file="data.json")),
            3,
            "data.json: instance_data_dir",
        ),
        (Interrupted("saved", exit_code=143), 143, "saved"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_errors_become_exit_codes(run, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, text: str):
    def fail(name: str) -> None:
        raise error

    monkeypatch.setattr("simpletuner.examples.example_summary", fail)
    result, _, errors = run("examples", "list")
    assert result == code
    assert text in errors
    assert "Traceback" not in errors


def test_a_fault_of_ours_is_one_line_and_a_file_with_the_traceback(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fail(name: str) -> None:
        raise KeyError("lost")

    monkeypatch.setattr("simpletuner.examples.example_summary", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, errors = run("examples", "list")
    assert code == 1
    assert "Traceback" not in errors
    [log] = tmp_path.glob("simpletuner-error-*.log")
    assert str(log) in errors
    assert "KeyError: 'lost'" in log.read_text()
    monkeypatch.setenv("SIMPLETUNER_DEBUG", "1")
    with pytest.raises(KeyError):
        run("examples", "list")


def test_an_error_with_a_cause_shows_its_traceback_when_debugging(run, monkeypatch):
    def fail(name: str) -> None:
        try:
            raise FileNotFoundError(2, "No such file or directory", "/lost")
        except OSError as error:
            raise DataError("cannot be read") from error

    monkeypatch.setattr("simpletuner.examples.example_summary", fail)
    code, _, errors = run("examples", "list")
    assert (code, errors.strip()) == (3, "cannot be read")
    monkeypatch.setenv("SIMPLETUNER_DEBUG", "1")
    code, _, errors = run("examples", "list")
    assert code == 3
    assert "FileNotFoundError: [Errno 2]" in errors


def train_program(train: str) -> str:
    """`simpletuner train` as a program of its own, with these lines in place of the training."""
    return (
        "import os, sys, types, simpletuner.launch as launch, simpletuner.training.preflight as preflight\n"
        "from simpletuner.errors import Interrupted\n"
        "from simpletuner.reporting.bus import EventBus\n"
        "from simpletuner.reporting.events import Notice\n"
        "from simpletuner.reporting.sinks.terminal import terminal_sink\n"
        "def train(loaded):\n"
        "    bus = EventBus([terminal_sink()])\n"
        f"{train}"
        "from simpletuner.config.options import TrainConfig\n"
        "config = TrainConfig.from_values({'model_family': 'omnigen', 'num_processes': 1})\n"
        "launch.load_arguments = lambda *words, **options: types.SimpleNamespace(config=config)\n"
        "preflight.check_model_folder = preflight.check_services = lambda *arguments: ()\n"
        "import simpletuner.training.disk_space as room; room.check_disk_space = lambda *arguments: None\n"
        "sys.modules['simpletuner.training.trainer'] = trainer = types.ModuleType('trainer')\n"
        "trainer.train = train\n"
        "sys.argv = ['simpletuner', 'train']\n"
        "from simpletuner.cli import main; main()"
    )


@pytest.mark.slow
def test_a_run_that_a_service_starts_without_streams_keeps_its_files_free_of_what_is_printed():
    end = "    bus.emit(Notice('info', 'on'))\n    raise Interrupted('ended', 40 + os.open(os.devnull, os.O_RDONLY))\n"
    command = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, train_program(end)]
    assert subprocess.run(command, timeout=300, check=False).returncode > 42


def test_a_working_folder_that_was_deleted_is_named(run, tmp_path: Path):
    tmp_path.rmdir()
    assert run("examples", "list") == (
        2,
        "",
        "the working folder of this shell was deleted\n  fix: change into a folder that is there (cd)\n",
    )


def test_what_a_terminal_has_no_letters_for_is_escaped(monkeypatch):
    shown = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "argv", ["simpletuner", "examples", "list"])
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr("simpletuner.examples.example_summary", lambda name: "\xe9 \u2603")
    assert exit_code_of(cli.main) == 0
    assert b"\xe9 \\u2603" in shown.buffer.getvalue()


@pytest.mark.slow
def test_a_reader_that_leaves_early_does_not_change_the_exit_code():
    program = train_program("    for number in range(100_000): bus.emit(Notice('info', str(number)))\n")
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=300) == 0
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("    raise Interrupted('stopped by SIGHUP: saved', 129)\n", 129),
        ("    raise KeyboardInterrupt\n", 130),
        ("    raise RuntimeError('a fault')\n", 1),
        ("", 0),
    ],
)
def test_a_terminal_that_is_gone_does_not_change_the_exit_code(end: str, code: int):
    """As a lost ssh connection: whatever is written after it fails with EIO."""
    # A terminal that hangs up ends its input; a read that begins later is refused.
    wait = "    try:\n        while os.read(0, 1): pass\n    except OSError: pass\n"
    program = train_program(
        "    bus.emit(Notice('info', 'begun'))\n" + wait + "    bus.emit(Notice('info', 'on'))\n" + end
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", program], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while b"begun" not in shown:
        shown += os.read(ours, 65536)
    os.close(ours)
    assert process.wait(timeout=300) == code


@pytest.mark.parametrize(("environment", "said"), [({}, 1), ({"RANK": "1"}, 0), ({"RANK": "0", LIFELINE: "3"}, 0)])
def test_one_process_of_a_run_says_what_all_would(monkeypatch, capsys, environment, said):
    for name in ("RANK", LIFELINE):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    say_for_all("using the example")
    assert capsys.readouterr().out.count("using the example") == said
