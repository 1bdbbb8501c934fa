"""A disk that is too small for what a run surely writes is found before anything is loaded."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from simpletuner.errors import DataError
from simpletuner.training.disk_space import check_disk_space, hub_cache
from tests.runs import load_here, write_run

Usage = namedtuple("Usage", ["total", "used", "free"])


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch):
    """Sets what the disks are said to have free."""

    def set_free(num_bytes: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, num_bytes))

    return set_free


def test_a_full_disk_ends_the_start(tmp_path: Path, omnigen_folder: Path, free):
    loaded = load_here(write_run(tmp_path, omnigen_folder))
    free(40 << 20)
    check_disk_space(loaded, {})
    free(10 << 20)
    with pytest.raises(DataError, match=r"logs, report and images alone, needs 32\.0 MiB, and only 10\.0 MiB are free"):
        check_disk_space(loaded, {})


def test_a_checkpoint_of_all_weights_is_as_large_as_the_model(tmp_path: Path, free):
    model = tmp_path / "model"
    (model / "transformer").mkdir(parents=True)
    (model / "transformer/model.safetensors").write_bytes(bytes(50 << 20))
    full = load_here(write_run(tmp_path / "run", model, model_type="full"))
    free(40 << 20)
    with pytest.raises(DataError, match=r"one checkpoint, with logs, report and images, needs 82\.0 MiB"):
        check_disk_space(full, {})
    check_disk_space(load_here(write_run(tmp_path / "other", model)), {})


def test_a_model_that_is_to_be_fetched_must_fit(tmp_path: Path, free):
    config = {"pretrained_model_name_or_path": "Shitao/OmniGen-v1-diffusers"}
    loaded = load_here(write_run(tmp_path, Path("unused"), **config))
    free(5 << 30)
    environment = {"HF_HOME": str(tmp_path / "hf")}
    with pytest.raises(DataError, match=r"Shitao/OmniGen-v1-diffusers, which is fetched .* needs 7.0 GiB"):
        check_disk_space(loaded, environment)
    (tmp_path / "hf/hub/models--Shitao--OmniGen-v1-diffusers").mkdir(parents=True)
    check_disk_space(loaded, environment)


def test_the_hub_cache_is_where_the_libraries_have_it(monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    home = Path("~/.cache/huggingface").expanduser()
    assert hub_cache({}) == home / "hub"
    if not {"HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME"} & set(os.environ):
        assert Path(constants.HF_HUB_CACHE) == home / "hub"
    assert hub_cache({"HF_HOME": "/a"}) == Path("/a/hub")
    assert hub_cache({"HF_HUB_CACHE": "/b", "HF_HOME": "/a"}) == Path("/b")
    assert hub_cache({"XDG_CACHE_HOME": "/c"}) == Path("/c/huggingface/hub")


def test_of_a_model_that_nobody_knows_no_size_is_asked_for(tmp_path: Path, free):
    """A full training of it writes its log at least."""
    config = {"pretrained_model_name_or_path": "somebody/else", "model_type": "full"}
    loaded = load_here(write_run(tmp_path, Path("unused"), **config))
    free(40 << 20)
    check_disk_space(loaded, {"HF_HOME": str(tmp_path / "hf")})
