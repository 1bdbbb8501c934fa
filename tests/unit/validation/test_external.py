"""A script of the user: what it is given, and that nobody waits for it."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice
from simpletuner.validation.external import LOG_FILE, ExternalScript
from tests.unit.validation.test_validator import Recorder

WRITE = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text('|'.join(sys.argv[2:]))"


class Scripts:
    def __init__(self, tmp_path: Path):
        self.tmp_path = tmp_path
        self.recorder = Recorder()

    def make(self, command: str, checkpoint: Path | None = None) -> ExternalScript:
        facts = {"validation_prompt": 'a "red" cat; rm $HOME {output_dir}', "output_dir": str(self.tmp_path)}
        return ExternalScript(command, facts, lambda: checkpoint, self.tmp_path, EventBus([self.recorder]))

    @property
    def reported(self) -> list[str]:
        return [notice.text for notice in self.recorder.of(Notice)]


@pytest.fixture
def scripts(tmp_path: Path) -> Scripts:
    return Scripts(tmp_path)


def python(code: str, *arguments: str) -> str:
    return shlex.join([sys.executable, "-c", code, *arguments])


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if path.is_file() and path.read_text():
            return path.read_text()
        time.sleep(0.02)
    raise AssertionError(f"{path} was not written")


def test_it_is_no_process_of_the_run(scripts: Scripts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script that starts torch's distributed package would otherwise join the run's own processes."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code = "import os, sys, pathlib as p; p.Path(sys.argv[1]).write_text(str(sorted({'RANK', 'HOME'} & {*os.environ})))"
    scripts.make(python(code, str(tmp_path / "told")), tmp_path).run(None, None, None, 20)
    assert wait_for(tmp_path / "told") == "['HOME']"


def test_placeholders_are_filled_in_as_whole_words_and_no_shell_reads_them(scripts: Scripts, tmp_path: Path) -> None:
    out = tmp_path / "told"
    command = python(WRITE, str(out), "{global_step}", "{local_checkpoint_path}", "{validation_prompt}")
    scripts.make(command, tmp_path / "checkpoint-20").run(None, None, None, 20)
    assert wait_for(out).split("|")[:2] == ["20", str(tmp_path / "checkpoint-20")]
    assert wait_for(out).split("|")[2].startswith('a "red" cat; rm $HOME ')
    assert scripts.reported == []


def test_nobody_waits_and_a_second_one_is_not_started_beside_it(scripts: Scripts, tmp_path: Path) -> None:
    script = scripts.make(python("import time; time.sleep(600)"))
    assert script.start(10)
    assert script.start(20) == []
    assert script._process is not None
    assert script._process.poll() is None  # who had waited for it would find it ended
    assert scripts.reported == ["step 20: validation_external_script still works on an earlier step; not started"]
    process = script._process
    assert process is not None
    process.kill()
    process.wait()
    assert script.start(30)
    assert scripts.reported[1:] == [
        f"validation_external_script ended with exit code -9; see {scripts.tmp_path / 'validation_external.log'}"
    ]
    script._process.kill()
    script._process.wait()
    script._process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    script._process.wait()
    words = python("import time; time.sleep(600)")
    assert script.start(40) == shlex.split(words)
    assert len(scripts.reported) == 2  # one that has ended well is not reported
    script._process.kill()
    assert (script.has_generated(40), script.write_summaries(40)) == (True, {})


def test_what_it_prints_is_kept_and_a_missing_program_is_reported(scripts: Scripts, tmp_path: Path) -> None:
    scripts.make(python("import sys; print('drawn', file=sys.stderr, flush=True); print('twice')")).start(1)
    assert wait_for(tmp_path / LOG_FILE).startswith("drawn\n")  # what goes to standard output may follow later
    assert scripts.make("no-such-program-here").start(1) == []
    assert "cannot be started" in scripts.reported[0]


def test_it_waits_for_the_first_checkpoint_where_it_asks_for_one(scripts: Scripts) -> None:
    assert scripts.make("generate {local_checkpoint_path}").start(1) == []
    assert scripts.reported == ["step 1: there is no checkpoint yet; validation_external_script was not started"]
    scripts.make("no-such-program-here").run(None, None, None, 0)
    assert len(scripts.reported) == 1
    scripts.make("no-such-program-here").run(None, None, None, 1)
    assert "cannot be started" in scripts.reported[1]
