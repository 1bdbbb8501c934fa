"""A hub on loopback, its client, and the files of a small run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants
from PIL import Image

from simpletuner import storage
from simpletuner.families.registry import get_spec
from simpletuner.hub.job import ADAPTER_FILE, HubJob
from tests.hub_uploads import TOKEN, upload_hub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    with upload_hub() as server:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


@pytest.fixture
def api(hub) -> HfApi:
    return HfApi(endpoint=hub.url, token=TOKEN)


@pytest.fixture
def job(tmp_path: Path) -> HubJob:
    (tmp_path / "dataset_report.json").write_text(
        json.dumps([{"id": "stars", "bucketed": 45, "sizes": {"64x64": 40, "96x64": 5}}])
    )
    (tmp_path / ADAPTER_FILE).write_bytes(b"the end")
    (tmp_path / "ema").mkdir()
    (tmp_path / "ema" / ADAPTER_FILE).write_bytes(b"average of the end")
    return HubJob(
        output_dir=tmp_path,
        name="stars",
        is_private=True,
        each_checkpoint=True,
        waits=False,
        spec=get_spec("omnigen"),
        kind="lokr",
        base_model="Shitao/OmniGen-v1-diffusers",
        licence="MIT",
        title="Stars: a | test",
        options={"learning_rate": 1e-3, "resolution": 64, "seed": 42, "optimizer": "adamw", "use_ema": True},
        instance_prompts=("a xyz star",),
        note="Generates **stars**.",
    )


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[int], Path]:
    def make(step: int) -> Path:
        """A committed checkpoint with weights, their average, and what only a resume needs."""
        path = tmp_path / f"checkpoint-{step}"
        with storage.commit_dir(path) as folder:
            (folder / ADAPTER_FILE).write_bytes(f"weights of {step}".encode())
            (folder / "optimizer.safetensors").write_bytes(b"state")
            (folder / "config.json").write_text("{}")
            (folder / "ema").mkdir()
            (folder / "ema" / ADAPTER_FILE).write_bytes(f"average of {step}".encode())
        return path

    return make


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "validation_images" / "a.png"
    path.parent.mkdir()
    Image.new("RGB", (8, 8), "red").save(path)
    return path
