"""Whether uploads are allowed is found out before a run, with the reason and the fix."""

from __future__ import annotations

import pytest
from huggingface_hub import HfApi, constants

from simpletuner.config.options import TrainConfig
from simpletuner.errors import ConfigError
from simpletuner.hub.access import access_problems, check_access
from simpletuner.hub.job import repository_name
from tests.configs import config_of


def config(**keys) -> TrainConfig:
    return config_of(**{"push_to_hub": True, "output_dir": "out/my run"} | keys)


def test_nothing_is_asked_where_nothing_is_uploaded(hub, api):
    assert check_access(config(push_to_hub=False), {}, api) == []
    assert hub.asked == []


@pytest.mark.parametrize("name", ["stars", "me/stars", "house/stars"])
def test_who_may_write_goes_on(hub, api, name):
    assert check_access(config(hub_model_id=name), {}, api) == []


@pytest.mark.parametrize(
    ("name", "role", "message"),
    [
        ("stars", "read", "can only read"),
        ("readers/stars", "write", 'may not write to "readers"'),
        ("strangers/stars", "write", "me, house"),
    ],
)
def test_who_may_not_write_is_reported_before_the_run(hub, api, name, role, message):
    hub.role = role
    with pytest.raises(ConfigError, match=message):
        check_access(config(hub_model_id=name), {}, api)


def test_a_token_that_is_not_accepted_is_reported_before_the_run(hub, api):
    hub.accepts_token = False
    with pytest.raises(ConfigError, match="hf auth login") as caught:
        check_access(config(), {}, api)
    assert api.token not in caught.value.render()


def test_a_hub_that_does_not_answer_is_a_warning(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    [line] = check_access(config(), {}, HfApi(endpoint="http://127.0.0.1:9", token="x"))
    assert "does not answer now" in line


def test_uploads_without_a_network_are_a_contradiction():
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        check_access(config(), {"HF_HUB_OFFLINE": "1"})


def test_a_token_of_single_rights_needs_that_of_writing():
    def me(*permissions: str, entity: str = "me") -> dict:
        scoped = [{"entity": {"name": entity, "type": "user"}, "permissions": list(permissions)}]
        return {"name": "me", "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": scoped}}}}

    assert list(access_problems(me("repo.content.read", "repo.write"), "stars")) == []
    assert list(access_problems(me("repo.content.read"), "stars"))
    assert list(access_problems(me("repo.write", entity="house"), "stars"))


@pytest.mark.parametrize(
    ("keys", "name"),
    [
        ({"hub_model_id": "house/x"}, "house/x"),
        ({"tracker_run_name": "A run: öne"}, "A-run-ne"),
        ({}, "my-run"),
        ({"tracker_run_name": "..."}, "simpletuner"),
    ],
)
def test_a_repository_is_called_like_the_run(keys, name):
    assert repository_name(config(**keys)) == name
