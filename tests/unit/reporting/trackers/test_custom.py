"""The tracker of TRACKERS.md, as it stands there, in a run."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

import simpletuner
from simpletuner.config.options.reporting import ReportingOptions
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import ImagesMade, RunFinished, RunStarted, SavedImage
from simpletuner.reporting.sinks import build_sinks
from simpletuner.reporting.trackers.base import Tracker
from simpletuner.reporting.trackers.custom import load_custom_tracker
from tests.events import step_done

PAGE = Path(simpletuner.__file__).parent.parent / "documentation" / "TRACKERS.md"


def test_the_tracker_of_the_page_works(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "line_tracker.py").write_text(code)
    named = ReportingOptions(report_to=("custom-tracker",), custom_tracker="line_tracker:LineTracker")
    with EventBus(build_sinks(named, tmp_path, is_new=True)) as bus:
        bus.emit(RunStarted("trial", tmp_path, 2))
        bus.emit(step_done(1, total_steps=2))
        bus.emit(ImagesMade(1, (SavedImage(tmp_path / "a.png", "cat", "a cat", 8, 8, 1, "live"),)))
        bus.emit(RunFinished(1, 1.0))
    assert (tmp_path / "losses.txt").read_text() == f"1 0.5000\n1 cat: {tmp_path / 'a.png'}\n"
    assert "losses of trial go to" in capsys.readouterr().out


def test_a_tracker_of_the_first_version_gets_images_under_the_old_name() -> None:
    class Old(Tracker):
        def log_pictures(self, pictures: Sequence[SavedImage], step: int) -> None:
            seen.append((pictures, step))

    seen: list[object] = []
    Old().log_images([], 3)
    assert seen == [([], 3)]


def test_a_file_of_the_working_folder_hides_no_installed_package(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    installed = list(sys.path)
    (tmp_path / "own_tracker_of_the_folder.py").write_text(
        "from simpletuner.reporting.trackers.base import Tracker\nclass Own(Tracker): pass\n"
    )
    assert load_custom_tracker("own_tracker_of_the_folder:Own").__name__ == "Own"
    assert sys.path == [*installed, str(tmp_path)]
