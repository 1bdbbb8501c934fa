"""What is said when a model cannot be had: the reason, and what to do about it."""

from __future__ import annotations

import httpx
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from simpletuner.errors import DataError
from simpletuner.models.components import fetch, nearest_hub_id

RESPONSE = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (GatedRepoError("gated", response=RESPONSE), "accept the licence on https://huggingface.co/Shitao/OmniGen-v1"),
        (RepositoryNotFoundError("no", response=RESPONSE), "no such model on the hub, or it is private"),
        (RemoteEntryNotFoundError("no", response=RESPONSE), "name a model in diffusers layout"),
        (LocalEntryNotFoundError("offline"), "check the connection and HF_ENDPOINT"),
    ],
)
def test_each_reason_has_its_remedy(monkeypatch: pytest.MonkeyPatch, error: Exception, words: str) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(DataError) as raised:
        fetch("Shitao/OmniGen-v1", "transformer/config.json", None, "pretrained_model_name_or_path")
    assert words in raised.value.render()


def test_a_hub_id_that_is_spelt_almost_right_is_suggested() -> None:
    assert nearest_hub_id("Shitao/OmniGen-v1-difusers") == "Shitao/OmniGen-v1-diffusers"
    assert nearest_hub_id("Shitao/OmniGen-v1-diffusers") is None
    assert nearest_hub_id("somebody/something-else") is None
