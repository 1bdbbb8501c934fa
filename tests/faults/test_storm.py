"""The real command, killed at random instants a hundred times, from its first cache to its last file."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
from collections import Counter
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest

from tests.faults import forks
from tests.faults.cases import differences, result_of, write

KILLS = 100
PHASES = ("caching", "training", "validation", "saving", "finishing")
OPTIONS = {"max_train_steps": 12, "checkpoints_total_limit": 2, "eval_steps_interval": 3, "validation_step_interval": 4}


@pytest.mark.ci
@pytest.mark.timeout(1800)
def test_a_storm_of_kills_through_every_phase_costs_nothing(place: Path, model: Path) -> None:
    run, start = place / "run", place / "start"
    write(run, model, **OPTIONS)
    shutil.copytree(run, start)
    seconds = _seconds(run)
    expected = result_of(run)
    rng, phases = random.Random(5), Counter[str]()
    while phases.total() < KILLS or any(not phases[phase] for phase in PHASES):
        shutil.rmtree(run)
        shutil.copytree(start, run)
        _storm(run, rng, seconds, phases)
        assert list(differences(run, expected)) == []
    print(dict(phases))


def _storm(run: Path, rng: random.Random, seconds: float, phases: Counter[str]) -> None:
    """Start and kill until the run comes to its end; at first soon, so that the caches see it too.

    Instants are drawn in CPU time of the run: by the clock, a machine with other work would kill each start
    before it comes to its first checkpoint.
    """
    patience = 0.15
    while True:
        process = forks.start(run)
        _wait(process, rng.uniform(0.02, patience) * seconds)
        process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0, forks.terminal(run)
            return
        phases[phase_of(run)] += 1
        assert phases.total() < 4 * KILLS, phases
        patience = min(patience * 1.2, 1.5)


def _seconds(run: Path) -> float:
    """Train to the end; how much CPU time it took."""
    process = forks.start(run)
    seconds = _wait(process, forks.SECONDS)
    process.kill()
    process.join()
    assert process.exitcode == 0, forks.terminal(run)
    return seconds


def _wait(process: BaseProcess, seconds: float) -> float:
    """Until the process has used so much CPU time or has ended; how much it has used."""
    assert process.pid is not None
    used = 0.0
    with contextlib.suppress(psutil.Error):  # it has ended
        watched = psutil.Process(process.pid)
        while used < seconds and process.is_alive():
            process.join(0.005)
            times = watched.cpu_times()
            used = times.user + times.system
    return used


def phase_of(run: Path) -> str:
    """What a run was doing when it was killed, as its record and its temporary names show.

    A living one may move any of them away, to `earlier-runs`, while they are looked at.
    """
    output = run / "output"
    if not (output / "metrics.jsonl").exists():  # it begins when the caches are there
        return "caching" if (run / "cache" / "vae").exists() else "starting"
    lines = (output / "metrics.jsonl").read_text(errors="replace").splitlines()
    last = _last_record(lines)
    if any(path.name.startswith(".tmp-") and path.is_dir() for path in output.glob(".*")):
        is_final = last.get("event") == "phase_started" and "weights" in last.get("name", "")
        return "finishing" if is_final else "saving"
    if last.get("event") == "phase_started":
        name = str(last.get("name"))
        words = {"images": "validation", "weights": "finishing"}
        return next((phase for word, phase in words.items() if word in name), "starting")
    if last.get("event") == "run_finished":
        return "finishing"
    return "training" if last.get("event") in ("step_done", "checkpoint_saved", "eval_done") else "starting"


def _last_record(lines: list[str]) -> dict:
    for line in reversed(lines):
        try:
            return json.loads(line)
        except ValueError:
            continue
    return {}
