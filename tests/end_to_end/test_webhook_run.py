"""Whole runs that report to a real HTTP server: one that works, and one that is down when the run is killed."""

from __future__ import annotations

import base64
import io
import json
import signal
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import pytest
from PIL import Image

from simpletuner.examples import example_dir
from tests.receiver import Receiver, receiver, wait_until
from tests.runs import cli, dataset, train_here, write_run

MODEL = example_dir("omnigen-tiny") / "model"
IMAGES = example_dir("omnigen-tiny") / "datasets" / "concept"


def pixels(event: dict[str, Any]) -> numpy.ndarray:
    """(H, W, 3) of the first image of an event."""
    (uri, *_) = event["images"]
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        return numpy.asarray(image.convert("RGB"), dtype=numpy.float64)


def sharpness(event: dict[str, Any]) -> float:
    """Mean square of the differences between neighbors: blurred edges have less."""
    image = pixels(event)
    return float((numpy.diff(image, axis=0) ** 2).mean() + (numpy.diff(image, axis=1) ** 2).mean())


def of_type(server: Receiver, kind: str) -> list[dict[str, Any]]:
    return [event for event in server.accepted if event["type"] == kind]


@pytest.mark.slow
def test_previews_arrive_at_the_right_steps_and_become_the_image(tmp_path: Path) -> None:
    options = {
        "max_train_steps": 2,
        "learning_rate": 1e-6,
        "validation_disable": False,
        "validation_prompt": "a blue circle on a white background",
        "validation_negative_prompt": "<cfg>",
        "validation_resolution": "64",
        "validation_num_inference_steps": 20,
        "validation_step_interval": 2,
        "validation_preview": True,
        "validation_preview_steps": 5,
    }
    with receiver() as server:
        webhook = {"webhook_type": "raw", "callback_url": server.url}
        data = [dataset("concept", instance_data_dir=str(IMAGES))]
        train_here(write_run(tmp_path, MODEL, data, webhook_config=webhook, **options))
    previews = [event for event in of_type(server, "validation.preview") if event["data"]["step"] == 2]
    assert [event["data"]["step_label"] for event in previews] == ["5/20", "10/20", "15/20", "20/20"]
    assert [event["message"] for event in previews] == ["a blue circle on a white background"] * 4
    timesteps = [event["data"]["timestep"] for event in previews]
    assert timesteps == sorted(timesteps, reverse=True)
    (final,) = [
        event
        for event in of_type(server, "validation.image")
        if event["data"]["step"] == 2 and event["data"]["pictures"][0]["kind"] == "live"
    ]
    distances = [float(numpy.abs(pixels(event) - pixels(final)).mean()) for event in previews]
    assert distances == sorted(distances, reverse=True), "each is nearer to the finished image"
    assert distances[-1] < 0.5 * distances[0], "what remains is the other decoder"
    edges = [sharpness(event) for event in previews[1:]]  # in the first, noise counts as edges
    assert edges == sorted(edges), "and sharper"
    kinds = [event["data"].get("status") for event in of_type(server, "training.status")]
    assert (kinds[0], kinds[-1]) == ("running", "completed")


@pytest.mark.slow
def test_a_run_that_is_killed_while_its_service_is_down_loses_no_checkpoint(
    tmp_path: Path, omnigen_folder: Path
) -> None:
    plain = train_here(write_run(tmp_path / "plain", omnigen_folder, max_train_steps=8))
    with receiver("hangs") as server:
        webhook = {"webhook_type": "raw", "callback_url": server.url}
        folder = write_run(tmp_path / "run", omnigen_folder, max_train_steps=8, webhook_config=webhook)
        spool = folder / "output" / "webhooks" / "1-raw"
        first = subprocess.Popen(cli("train"), cwd=folder, stdout=subprocess.DEVNULL)
        wait_until(lambda: len(list(spool.glob("*-*.json"))) >= 2, seconds=120)
        first.send_signal(signal.SIGKILL)
        first.wait()
        saved = {path.name for path in (folder / "output").glob("checkpoint-*")}
        assert server.accepted == []
        server.behavior = "ok"
        output = train_here(folder)
    checkpoints = of_type(server, "training.checkpoint")
    assert {event["data"]["checkpoint"]["label"] for event in checkpoints} >= saved | {"checkpoint-8"}
    run_id = json.loads((output / "run_history.json").read_text())["run"]
    assert {event["run_id"] for event in checkpoints} == {run_id}, "both starts are of one run"
    assert max(Counter(event["id"] for event in server.accepted).values()) == 1
    assert of_type(server, "training.status")[-1]["data"]["status"] == "completed"
    assert list(spool.glob("*-*.json")) == []
    weights = "pytorch_lora_weights.safetensors"
    assert (output / weights).read_bytes() == (plain / weights).read_bytes(), "and the run learned what it would have"
