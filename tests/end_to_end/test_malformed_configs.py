"""Malformed configurations as a user meets them: a process each, which ends with code 2 before torch could be imported.

What each message says is tested in `tests/unit/config/test_malformed.py`; here, that the command as a whole is quick.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from simpletuner.config.options import all_options
from tests.runs import write_run
from tests.unit.config.test_malformed import CASES, SOUND, misspelled

MAX_SECONDS = 2.0
BROKEN_TEXTS = [
    "",
    "[]",
    "null",
    SOUND[:-1] + ",}",
    "\ufeff" + SOUND,
    SOUND[:-1],
    SOUND[:-1] + ', "seed": 1, "seed": 2}',
]
ENVIRONMENTS: list[Mapping[str, str]] = [
    {"ENV": "nowhere"},
    {"CONFIG_BACKEND": "yaml"},
    {"CONFIG_BACKEND": "toml"},
    {"CONFIG_PATH": "nowhere.json"},
    {"SIMPLETUNER_SEED": "abc"},
]


def malformed(sound: Mapping[str, object]) -> Iterator[tuple[str, Mapping[str, str], str]]:
    """(text of config.json, environment, what the message must name)."""
    draw = random.Random(5)
    for key in draw.sample(sorted(all_options()), 80):
        wrong = misspelled(key, draw)
        yield json.dumps({**sound, wrong: "1"}), {}, wrong
    for key, value in draw.sample([case for case in CASES if case[0] != "model_family"], 80):
        yield json.dumps({**sound, key: value}), {}, key
    yield json.dumps({**sound, "num_train_epochs": 3}), {}, "num_train_epochs"
    yield json.dumps({**sound, "data_backend_config": "nowhere.json"}), {}, "data_backend_config"
    for text in BROKEN_TEXTS:
        yield text, {}, "config.json"
    for environment in ENVIRONMENTS:
        yield json.dumps(sound), environment, next(iter(environment.values()))


def processor_seconds(folder: Path, environment: Mapping[str, str]) -> tuple[int, str, float]:
    """Exit code and messages of `simpletuner train`, and the CPU time that it took: others share the machine."""
    program = [sys.executable, "-m", "simpletuner", "train"]
    process = subprocess.Popen(
        program, cwd=folder, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    reported = process.stderr.read().decode()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    return process.returncode, reported, usage.ru_utime + usage.ru_stime


@pytest.mark.ci
def test_each_of_them_ends_within_two_seconds_and_names_what_is_wrong(tmp_path: Path, omnigen_folder: Path):
    folder = write_run(tmp_path / "run", omnigen_folder)
    sound = json.loads((folder / "config.json").read_text())
    cases = list(malformed(sound))
    assert len(cases) >= 150
    slowest, faults = 0.0, []
    for text, environment, named in cases:
        (folder / "config.json").write_text(text)
        code, reported, seconds = processor_seconds(folder, environment)
        slowest = max(slowest, seconds)
        if code != 2 or "Traceback" in reported or named not in reported:
            faults.append((text[-60:], environment, code, reported[-300:]))
    print(f"{len(cases)} malformed configurations, the slowest took {slowest:.2f} s of CPU time")
    assert faults == []
    assert slowest < MAX_SECONDS
