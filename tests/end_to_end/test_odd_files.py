"""Ninety-odd kinds of damaged and odd files: no crash, each told with its reason, the sound ones trained on."""

from __future__ import annotations

import json
import os
import re
import stat
from hashlib import sha256
from pathlib import Path

import pytest

from simpletuner.commands import cache
from simpletuner.text import printable
from tests.runs import dataset, load_here, train_here, write_images, write_run
from tests.unit.data.odd_files import DAMAGED_FILES, MOVING, ODD_BUT_SOUND, write_odd_files


def state_of(folder: Path) -> dict[str, tuple[object, ...]]:
    """Kind, time and content of everything below a folder; nothing that would block is opened."""
    found: dict[str, tuple[object, ...]] = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        content = sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        found[os.fspath(path)] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


@pytest.fixture
def folder(tmp_path: Path, omnigen_folder: Path) -> Path:
    folder = tmp_path / "run"
    prompt = {"caption_strategy": "instanceprompt", "instance_prompt": "a thing", "minimum_image_size": 8}
    write_images(write_odd_files(folder / "damaged", DAMAGED_FILES) / "good", 2, seed=1)
    write_odd_files(folder / "odd", ODD_BUT_SOUND)
    entries = [dataset(name, crop=True, **prompt) for name in ("damaged", "odd")]
    return write_run(folder, omnigen_folder, entries, max_train_steps=4, checkpoint_step_interval=0)


@pytest.mark.slow
def test_no_file_crashes_a_run_and_each_is_reported_with_its_reason(folder, monkeypatch):
    monkeypatch.chdir(folder)
    before = state_of(folder)
    cache.build(load_here(folder))
    reports = json.loads((folder / "output/dataset_report.json").read_text())
    lines = [json.loads(line) for line in (folder / "output/dataset_set_aside.jsonl").read_text().splitlines()]
    reported = {line["path"]: line["reason"] for line in lines}
    assert len(lines) == len(reported) == sum(entry["count"] for report in reports for entry in report["set_aside"])
    expected = {printable(os.fsdecode(odd.name)): odd.reason for odd in DAMAGED_FILES}
    assert reported.keys() == expected.keys()
    wrong = {name: reported[name] for name in reported if not re.search(expected[name], reported[name])}
    assert wrong == {}
    [odd] = [report for report in reports if report["id"] == "odd"]
    assert (odd["found"], odd["bucketed"]) == (len(ODD_BUT_SOUND), len(ODD_BUT_SOUND))
    assert odd["duplicates"] == 1
    [note] = [note for note in odd["notes"] if note["note"] == "several frames, of which the first is used"]
    assert note["count"] == len(MOVING)
    assert note["examples"] == sorted(MOVING)
    assert not Path("unpickled").exists()

    train_here(folder)
    after = state_of(folder)
    assert {path: after.get(path) for path in before} == before
