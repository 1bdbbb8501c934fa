"""The images that a report shows of its data, and that a report which cannot be written costs no run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from simpletuner import storage
from simpletuner.errors import DataError, Problem
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice
from simpletuner.training import report
from tests.toy import Recorder

RED, GREEN = (255, 0, 0), (0, 255, 0)


def tile(*images: Image.Image, caption: str = "a caption", note: str = "") -> Any:
    return SimpleNamespace(images=list(images), caption=caption, note=note)


def plain(width: int, height: int, color: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (width, height), color)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Two images of each dataset; a list of what was asked for."""
    calls: list[tuple[str, int]] = []

    def choose(dataset: Any, count: int) -> list[Any]:
        calls.append((dataset.id, count))
        return [tile(plain(8, 4, RED), caption=f"{n} of {dataset.id}", note="mirrored" * n) for n in range(2)]

    monkeypatch.setattr(report, "choose_images", choose)
    return calls


def datasets(**fingerprints: str) -> Any:
    return [SimpleNamespace(id=name, fingerprint=value) for name, value in fingerprints.items()]


def test_images_are_listed_with_their_dataset_caption_and_note(tmp_path: Path, asked: list) -> None:
    report.write_contact_images(tmp_path / "contact", datasets(one="f", two="g"))
    assert asked == [("one", 12), ("two", 12)]
    listed = json.loads((tmp_path / "contact/pictures.json").read_text())
    assert listed[1] == {"dataset": "one", "file": "0_01.webp", "caption": "1 of one", "note": "mirrored"}
    assert [each["file"] for each in listed] == ["0_00.webp", "0_01.webp", "1_00.webp", "1_01.webp"]
    assert all((tmp_path / "contact" / each["file"]).is_file() for each in listed)
    assert storage.read_manifest(tmp_path / "contact").metadata["datasets"] == {"one": "f", "two": "g"}


def test_images_are_fetched_again_only_where_a_dataset_has_changed_or_they_are_not_whole(
    tmp_path: Path, asked: list
) -> None:
    folder = tmp_path / "contact"
    for _ in range(2):
        report.write_contact_images(folder, datasets(one="f"))
    assert len(asked) == 1
    report.write_contact_images(folder, datasets(one="g"))
    assert len(asked) == 2
    (folder / "pictures.json").unlink()
    report.write_contact_images(folder, datasets(one="g"))
    assert len(asked) == 3


def test_references_crop_and_mask_stand_side_by_side(tmp_path: Path) -> None:
    report._save(tile(plain(4, 6, RED), plain(2, 8, GREEN)), tmp_path / "small.webp")
    with Image.open(tmp_path / "small.webp") as image:
        assert image.size == (6, 8)
        pixels = [image.convert("RGB").getpixel(place) for place in ((3, 5), (4, 7), (0, 7))]
    assert pixels == [RED, GREEN, (0, 0, 0)]  # without a loss
    report._save(tile(plain(640, 320, RED), plain(640, 320, GREEN)), tmp_path / "large.webp")
    with Image.open(tmp_path / "large.webp") as image:
        assert image.size == (320, 80)


def test_a_report_that_cannot_be_written_is_a_warning_with_the_command_that_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder, output = Recorder(), tmp_path / "an output"
    monkeypatch.setattr(report, "write_contact_images", lambda *given: None)
    for error in (OSError("gone"), DataError(Problem("no room"))):

        def refuse(folder: Path, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(report, "write_report", refuse)
        report.report_run(output, [], EventBus([recorder]))
    again = f"to try again: simpletuner report '{output}'"
    told = [(notice.severity, notice.text) for notice in recorder.of(Notice)]
    assert told == [("warning", f"no report.html: {reason}; {again}") for reason in ("gone", "no room")]
