"""For what a run waits while it uploads, and what the uploads of a killed one leave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from simpletuner.hub.job import ADAPTER_FILE, HubJob
from simpletuner.hub.publisher import STAGING_DIR, Publisher
from simpletuner.reporting.events import CheckpointSaved, RunStarted


@pytest.mark.parametrize(("deadline", "waits"), [(None, 1), (float("inf"), 3)])
def test_a_pause_of_before_the_end_is_cut_short_by_it_and_one_of_the_end_is_not(
    job: HubJob, monkeypatch: pytest.MonkeyPatch, deadline: float | None, waits: int
) -> None:
    publisher, count = Publisher(job, None), []

    def wait(seconds: float) -> None:
        count.append(seconds)
        publisher._deadline, publisher._is_closing = float("inf"), len(count) == 3

    publisher._deadline = deadline
    monkeypatch.setattr(publisher._changed, "wait", wait)
    publisher._pause(600.0)
    assert len(count) == waits


def test_what_a_killed_process_had_staged_is_removed_at_the_next_start(job: HubJob) -> None:
    left = job.output_dir / STAGING_DIR / "step-5"
    left.mkdir(parents=True)
    (left / ADAPTER_FILE).write_bytes(b"half")
    Publisher(job, None).handle(RunStarted("stars", job.output_dir, 100))
    assert not left.exists()


@pytest.mark.parametrize("failure", ["_refusal", "_trouble"])
def test_who_waits_for_an_upload_goes_on_when_it_fails(
    job: HubJob, checkpoint: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    asked: list[Any] = []
    publisher = Publisher(replace(job, waits=True), None, should_stop=lambda: asked.append(1) or True)

    def enqueue(upload: Any) -> None:
        publisher._waiting.append(upload)
        setattr(publisher, failure, "no")

    monkeypatch.setattr(publisher, "_enqueue", enqueue)
    publisher.handle(RunStarted("stars", job.output_dir, 100))
    publisher.handle(CheckpointSaved(10, checkpoint(10)))
    assert len(publisher._waiting) == 1
    assert asked == []


def test_an_upload_keeps_no_process_from_its_end(job: HubJob, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher = Publisher(job, None)
    monkeypatch.setattr(publisher, "_work", lambda: None)
    publisher._enqueue(object())  # type: ignore[arg-type]
    assert publisher._worker is not None
    assert publisher._worker.daemon
