"""What the review says of memory, disk and time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from simpletuner.hardware import GIB
from simpletuner.wizard.estimate import Estimate, Estimating, estimate_lines, rough_lines
from simpletuner.wizard.files import judge, texts_for
from simpletuner.wizard.project import open_project
from tests.unit.wizard.projects import CONFIG, CPU, LARGE_GPU, SMALL_GPU, answers, new_folder


def test_more_than_there_is_is_not_well():
    found = Estimate(memory=13 * GIB, disk=2 * GIB, free_disk=1 * GIB, steps=100, seconds=(50.0, 70.0))
    assert estimate_lines(found, SMALL_GPU) == [
        ("memory  13.0 GiB of 12.0 GiB", False),
        ("disk    2.0 GiB, 1.0 GiB free", False),
        ("time    100 steps, 0.5 s each: 50 s; encoding: 1 min 10 s", True),
    ]
    assert all(is_well for _, is_well in estimate_lines(Estimate(memory=GIB, disk=1, free_disk=2), CPU))


def test_why_time_was_not_measured_is_said():
    [*_, (line, _)] = estimate_lines(Estimate(steps=3, why_no_time="not measured: too slow here"), CPU)
    assert line == "time    3 steps; not measured: too slow here"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_folder(tmp_path)


def test_of_a_model_that_is_not_here_the_registry_s_figures_are_shown(folder: Path):
    """By hand: 3.76e9 weights of 2 bytes; 2 x 3.76e9 x (1024 + 100) tokens x 3 passes x 1000 images at 50e12."""
    project = open_project(CONFIG, folder, LARGE_GPU)
    options = {"max_train_steps": 1000, "train_batch_size": 1, "gradient_checkpointing": True, "resolution": 512}
    given = answers(hardware=LARGE_GPU, goal="style", options=options)
    run = judge(project, texts_for(project, given), given).run
    assert run is not None
    (memory, fits), (disk, _), (time, _) = rough_lines(run, LARGE_GPU)
    assert memory == "memory  at least 7.0 GiB for the weights of OmniGen, of 80.0 GiB"
    assert fits
    assert "7.0 GiB" in disk
    assert "8 min 27 s at 50 trillion" in time
    (memory, fits), _, (time, _) = rough_lines(run, replace(CPU, device_bytes=6 * GIB))
    assert not fits
    assert "23 h 29 min at 0.3 trillion" in time
    for base, mixed, size in (("no_change", "no", "14.0"), ("int8-quanto", "no", "3.5"), ("nf4-bnb", "bf16", "1.8")):
        formats = {"base_model_precision": base, "mixed_precision": mixed}
        (memory, _), *_ = rough_lines(replace(run, config=run.config.with_values(formats)), LARGE_GPU)
        assert memory.startswith(f"memory  at least {size} GiB for the weights")


@pytest.mark.slow
def test_a_model_that_is_not_here_is_not_fetched_for_an_estimate(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    project = open_project(CONFIG, folder, CPU)
    given = answers(goal="style")
    estimating = Estimating(folder)
    estimating.ask(project, texts_for(project, given), None)
    [found] = estimating
    assert "Shitao/OmniGen-v1-diffusers" in found.error
    assert not (folder / "config").exists()


def test_what_is_estimated_is_what_would_be_saved():
    estimating, file = object.__new__(Estimating), Path("config/config.json")
    places = SimpleNamespace(config=file, working_dir=Path("here"))
    estimating.ask(SimpleNamespace(places=places, texts={file: "old", Path("data.json"): "[]"}), {file: "new"}, 24)
    assert estimating._asked == {
        "config": "config/config.json",
        "working_dir": "here",
        "unsaved": {"config/config.json": "new", "data.json": "[]"},
        "other_gpu": 24,
    }


def test_an_estimate_that_nobody_waits_for_ends(folder: Path):
    project = open_project(CONFIG, folder, CPU)
    estimating = Estimating(folder)
    estimating.ask(project, texts_for(project, answers(goal="style")), None)
    estimating.stop()
    assert list(estimating) == []
