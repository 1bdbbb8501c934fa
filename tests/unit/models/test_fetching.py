"""What is said when a model cannot be fetched: the reason, and what to do about it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from simpletuner.errors import DataError
from simpletuner.families.registry import get_spec
from simpletuner.models import components, hub_connectivity
from simpletuner.models.components import ModelSource, component_folder, fetch, load_component, nearest_hub_id
from tests.hub import fake_hub

RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("gated", response=RESPONSE), "accept the license on https://huggingface.co/Shitao/OmniGen-v1"),
        (RepositoryNotFoundError("no", response=RESPONSE), "no such model on the hub, or it is private"),
        (RemoteEntryNotFoundError("no", response=RESPONSE), "name a model in diffusers layout"),
        (LocalEntryNotFoundError("offline"), "check the connection and HF_ENDPOINT"),
    ],
)
def test_each_reason_has_its_remedy(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    monkeypatch.setattr(components, "why_missing", lambda *_: None)
    with pytest.raises(DataError) as raised:
        fetch("Shitao/OmniGen-v1", "transformer/config.json", None, "pretrained_model_name_or_path")
    assert words in raised.value.render()


def test_a_hub_id_that_is_spelled_almost_right_is_suggested() -> None:
    assert nearest_hub_id("Shitao/OmniGen-v1-difusers") == "Shitao/OmniGen-v1-diffusers"
    assert nearest_hub_id("Shitao/OmniGen-v1-diffusers") is None
    assert nearest_hub_id("somebody/something-else") is None


def without_network(monkeypatch: pytest.MonkeyPatch, endpoint: str = "http://127.0.0.1:9") -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(hub_connectivity, "PAUSE_SECONDS", 0.0)


def test_a_model_that_cannot_be_fetched_is_reported_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    without_network(monkeypatch)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    with pytest.raises(DataError, match=r"127\.0\.0\.1 cannot be reached \(Connection refused\)"):
        fetch("Shitao/OmniGen-v1-diffusers", "transformer/config.json", None, "pretrained_model_name_or_path")
    assert sum(slept) < 5


@pytest.mark.parametrize(
    ("answers", "found"),
    [([None], None), (["lost", None], None), (["lost", "lost"], "hub.example cannot be reached (lost)")],
)
def test_a_connection_that_fails_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, answers: list[str | None], found: str | None
) -> None:
    without_network(monkeypatch, "https://hub.example")
    monkeypatch.setattr(hub_connectivity, "getproxies", dict)
    asked: list[tuple[str, int]] = []
    given = iter(answers)
    monkeypatch.setattr(
        hub_connectivity, "_failure_to_connect", lambda host, port: asked.append((host, port)) or next(given)
    )
    assert hub_connectivity.why_unreachable() == found
    assert asked == [("hub.example", 443)] * len(answers)


def test_what_was_fetched_before_needs_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--me--model"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / "config.json").write_text("{}")
    without_network(monkeypatch)
    assert hub_connectivity.why_missing("me/model", "config.json") is None
    assert hub_connectivity.why_missing("me/model", "other.json") is not None


def test_a_mirror_is_asked_in_place_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_hub() as mirror:
        without_network(monkeypatch, mirror.url)
        assert hub_connectivity.why_unreachable() is None


def test_a_proxy_is_left_to_find_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    without_network(monkeypatch, "http://nowhere.invalid")
    assert "nowhere.invalid cannot be reached" in str(hub_connectivity.why_unreachable())
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:3128")
    assert hub_connectivity.why_unreachable() is None
    monkeypatch.setenv("no_proxy", "nowhere.invalid")
    assert "nowhere.invalid cannot be reached" in str(hub_connectivity.why_unreachable())


def test_a_lost_connection_is_among_the_failures_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    without_network(monkeypatch)
    with pytest.raises(hub_connectivity.hub_failures()):
        HfApi(endpoint="http://127.0.0.1:9", token="x").whoami()


def test_every_part_is_of_the_revision_that_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source = ModelSource("owner/model", revision="v2", variant="fp16")
    parts = {part.name: part for part in get_spec("sd15").components}
    asked: list[tuple[str, dict[str, Any]]] = []

    def fetched(where: str, **options: Any) -> str:
        asked.append((where, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    monkeypatch.setattr(components, "load_pretrained", lambda cls, where, **options: fetched(where, **options))
    assert component_folder(source, parts["tokenizer"]) == tmp_path / "tokenizer"
    load_component(source, parts["vae"], torch.float32)
    assert asked == [
        ("owner/model", {"revision": "v2", "allow_patterns": ["tokenizer/*"]}),
        (
            "owner/model",
            {"torch_dtype": torch.float32, "subfolder": "vae", "revision": "v2", "variant": "fp16"},
        ),
    ]


@pytest.mark.parametrize(("repository", "is_near"), [("black-forest-labs/FLUX.1-dv", True), ("mine/own", False)])
def test_a_name_that_is_almost_a_published_one_is_proposed(repository: str, is_near: bool) -> None:
    [problem] = components._not_fetched("config.json", repository, "key", OSError("gone")).problems
    assert problem.fix is not None
    assert problem.fix.startswith('did you mean "black-forest-labs/FLUX.1-dev"? Otherwise ') == is_near
    assert ("did you mean" in problem.fix) == is_near
    assert "check the connection" in problem.fix
