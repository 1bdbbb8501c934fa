"""Whole runs that upload to a hub on loopback."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.hub_uploads import TOKEN, UploadHub, upload_hub
from tests.runs import run_cli, write_run

pytestmark = pytest.mark.slow


@pytest.fixture
def hub():
    with upload_hub() as server:
        yield server


def environment(hub: UploadHub, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}


def test_a_run_uploads_its_checkpoints_and_its_end_and_keeps_the_token_to_itself(omnigen_folder, tmp_path, hub):
    keys = {"push_to_hub": True, "push_checkpoints_to_hub": True, "hub_model_id": "house/squares"}
    folder = write_run(tmp_path / "run", omnigen_folder, max_train_steps=4, **keys)
    done = run_cli(folder, "train", environment=environment(hub, tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    repo = hub.repos["house/squares"]
    assert repo.is_private
    assert repo.commits[-1][0] == "Weights of step 4, the end of the run"
    assert "step-4" in repo.tags
    written = (folder / "output" / "pytorch_lora_weights.safetensors").read_bytes()
    assert repo.files["pytorch_lora_weights.safetensors"] == written
    assert not [name for name in repo.files if "optimizer" in name or "state" in name]
    assert f"uploaded to {hub.url}/house/squares" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    for path in folder.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN.encode() not in b"".join(repo.files.values())


def test_a_run_whose_upload_is_refused_leaves_with_5_and_the_next_start_uploads(omnigen_folder, tmp_path, hub):
    folder = write_run(tmp_path / "run", omnigen_folder, max_train_steps=2, push_to_hub=True)
    hub.answers = [403] * 20
    done = run_cli(folder, "train", environment=environment(hub, tmp_path / "home"))
    assert done.returncode == 5, done.stderr
    assert "hf upload me/output" in done.stderr
    assert "Traceback" not in done.stderr
    assert (folder / "output" / "pytorch_lora_weights.safetensors").is_file()
    hub.answers = []
    again = run_cli(folder, "train", environment=environment(hub, tmp_path / "home"))
    assert again.returncode == 0, again.stderr
    assert "pytorch_lora_weights.safetensors" in hub.repos["me/output"].files


def test_a_token_that_cannot_write_is_found_before_anything_is_encoded(omnigen_folder, tmp_path, hub):
    hub.role = "read"
    folder = write_run(tmp_path / "run", omnigen_folder, push_to_hub=True)
    done = run_cli(folder, "train", environment=environment(hub, tmp_path / "home"))
    assert done.returncode == 2
    assert "can only read" in done.stderr
    assert not (folder / "cache").exists()
