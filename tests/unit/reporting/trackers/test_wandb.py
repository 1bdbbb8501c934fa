"""W&B itself, offline and without a network: what it wrote is read back by its own reader."""

from __future__ import annotations

import ast
import json
import logging
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import simpletuner
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import EvalDone, ImagesMade, Notice, RunFinished, RunStarted, SavedImage
from simpletuner.reporting.trackers.background import TrackerSink
from simpletuner.reporting.trackers.wandb import WandbTracker
from tests.events import step_done

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    logging.getLogger("wandb").setLevel(logging.ERROR)


class Notes:
    name, failures = "notes", ()

    def __init__(self) -> None:
        self.texts: list[str] = []

    def handle(self, event) -> None:
        if isinstance(event, Notice):
            self.texts.append(event.text)

    def close(self) -> None:
        pass


def track(folder: Path, start: int, end: int) -> list[str]:
    """Steps `start + 1` to `end` of a run of ten; returns what the terminal was reported."""
    Image.new("RGB", (8, 6), "red").save(folder / "a.png")
    notes = Notes()
    with EventBus([notes, TrackerSink("W&B", WandbTracker, "shapes")]) as bus:
        bus.emit(RunStarted("trial", folder, 10, start, {"device": "cpu"}, {"seed": 42}))
        for number in range(start + 1, end + 1):
            bus.emit(step_done(number, loss=1 / number))
        bus.emit(EvalDone(end, {"held": 0.5}, 0.5))
        bus.emit(ImagesMade(end, (SavedImage(folder / "a.png", "cat", "a cat", 8, 6, 1, "live"),)))
        bus.emit(RunFinished(end, 1.0))
    return notes.texts


def read_back(folder: Path) -> list[dict[str, Any]]:
    """As `read_files`, once W&B's process has written the end of each run, which it does behind our back."""
    deadline = time.monotonic() + 120
    runs = read_files(folder)
    while not all("exit" in run for run in runs) and time.monotonic() < deadline:
        time.sleep(0.05)
        runs = read_files(folder)
    return runs


def read_files(folder: Path) -> list[dict[str, Any]]:
    """Id, project, configuration, history and end of each offline run, by W&B's own message classes."""
    from wandb.proto import wandb_internal_pb2

    runs = []
    for path in sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        found: dict[str, Any] = {"history": [], "config": {}}
        for data in log_records(path.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                found |= {"id": record.run.run_id, "project": record.run.project, "name": record.run.display_name}
                found["config"] |= {i.key: json.loads(i.value_json) for i in record.run.config.update}
            elif kind == "history":
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                found["history"].append(items)
            elif kind == "exit":
                found["exit"] = record.exit.exit_code
        runs.append(found)
    return runs


def log_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log: blocks of 32 KiB, each part with checksum, length and place in its record."""
    position, parts = 7, []  # after W&B's own header
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield b"".join(parts)
            parts = []


def test_an_offline_run_has_numbers_images_configuration_and_its_name(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    reported = track(tmp_path, 0, 3)
    [run] = read_back(tmp_path)
    assert (run["project"], run["name"], run["exit"]) == ("shapes", "trial", 0)
    assert run["config"]["seed"] == 42
    assert [row["train/loss"] for row in run["history"]] == [1, 0.5, pytest.approx(1 / 3)]
    assert run["history"][-1]["loss/val/held"] == 0.5
    assert run["history"][-1]["pictures/live/cat_8x6/caption"] == "a cat"
    assert len(list((tmp_path / "wandb").glob("offline-run-*/files/media/**/*.png"))) == 1
    assert len(reported) == 1
    assert "wandb sync" in reported[0]
    assert Path(reported[0].split("wandb sync ")[1]).is_dir()


def test_a_run_that_goes_on_is_the_same_run_and_a_new_one_is_not(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    track(tmp_path, 0, 2)
    track(tmp_path, 2, 4)
    track(tmp_path, 0, 1)
    first, second, third = (run["id"] for run in read_back(tmp_path))
    assert first == second != third


def test_a_service_that_is_not_there_is_reported_once(tmp_path: Path):
    code = f"from {__name__} import track; from pathlib import Path; print(track(Path({str(tmp_path)!r}), 0, 3))"
    here = {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "k" * 40}
    paths = [str(Path(__file__).parent), str(Path(simpletuner.__file__).parent.parent)]
    environment = os.environ | here | {"WANDB_INIT_TIMEOUT": "4", "PYTHONPATH": os.pathsep.join(paths)}
    code = code.replace(__name__, Path(__file__).stem)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0
    reported = ast.literal_eval(done.stdout)
    assert len(reported) == 1
    assert reported[0].startswith("W&B stopped working (")
    assert "kkkk" not in done.stdout + done.stderr
