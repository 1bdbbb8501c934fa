"""The real command, killed at random instants a hundred times, from its first cache to its last file."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.faults import forks
from tests.faults.cases import differences, result_of, write

KILLS = 100
PHASES = ("caching", "training", "validation", "saving", "finishing")
OPTIONS = {"max_train_steps": 12, "checkpoints_total_limit": 2, "eval_steps_interval": 3, "validation_step_interval": 4}


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_a_storm_of_kills_through_every_phase_costs_nothing(place: Path, model: Path) -> None:
    run, start = place / "run", place / "start"
    write(run, model, **OPTIONS)
    shutil.copytree(run, start)
    assert forks.run(run) == 0, forks.terminal(run)
    seconds = _seconds(run)
    expected = result_of(run)
    rng, phases = random.Random(5), Counter[str]()
    while phases.total() < KILLS or any(not phases[phase] for phase in PHASES):
        shutil.rmtree(run)
        shutil.copytree(start, run)
        _storm(run, rng, seconds, phases)
        assert list(differences(run, expected)) == []
        assert phases.total() < 4 * KILLS, phases
    print(dict(phases))


def _storm(run: Path, rng: random.Random, seconds: float, phases: Counter[str]) -> None:
    """Start and kill until the run comes to its end; at first soon, so that the caches see it too."""
    patience = 0.15
    while True:
        process = forks.start(run)
        process.join(rng.uniform(0.02, patience) * seconds)
        if process.exitcode is None:
            phases[phase_of(run)] += 1
            process.kill()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0, forks.terminal(run)
            return
        patience = min(patience * 1.2, 1.5)


def _seconds(run: Path) -> float:
    """How long the run took, from its start to its last event."""
    rows = [json.loads(line) for line in (run / "output" / "metrics.jsonl").read_text().splitlines()]
    return float(rows[-1]["time"]) - float(rows[0]["time"]) + 1.0


def phase_of(run: Path) -> str:
    """What a run is doing, as its record and its temporary names show."""
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
