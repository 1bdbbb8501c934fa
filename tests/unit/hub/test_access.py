"""Whether uploads are allowed is found out before a run, with the reason and the fix."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, constants

from simpletuner.config.options import TrainConfig
from simpletuner.errors import ConfigError
from simpletuner.hub.access import access_problems, check_access
from simpletuner.hub.client import is_final, reason_of, status_of
from simpletuner.hub.job import kind_of, repository_name
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
    assert line.startswith("the Hub at http://127.0.0.1:9 does not answer now (")
    assert line.endswith("); uploads are retried during the run")


def test_the_login_of_a_mirror_is_not_shown(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    [line] = check_access(config(), {}, HfApi(endpoint="http://me:secret@127.0.0.1:9", token="x"))
    assert "the Hub at http://127.0.0.1:9" in line
    assert "secret" not in line
    error = OSError("404 for url: https://me:secret@mirror.example/api/models/a@b and https://other.example/c@d")
    assert reason_of(error) == "404 for url: https://mirror.example/api/models/a@b and https://other.example/c@d"


def test_without_a_token_a_hub_that_does_not_answer_is_an_error(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="push_to_hub: nobody is logged in to the Hub\n  fix: run: hf auth login"):
        check_access(config(), {}, HfApi(endpoint="http://127.0.0.1:9"))


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
def test_uploads_without_a_network_are_a_contradiction(value):
    with pytest.raises(ConfigError, match="push_to_hub: HF_HUB_OFFLINE is set: nothing can be uploaded"):
        check_access(config(), {"HF_HUB_OFFLINE": value})


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
        ({"tracker_run_name": "x" * 97}, "x" * 96),  # the longest that the Hub takes
    ],
)
def test_a_repository_is_called_like_the_run(keys, name):
    assert repository_name(config(**keys)) == name


def refusal(status: int | None, text: str = "") -> Exception:
    error = RuntimeError(text)
    if status is not None:
        error.response = SimpleNamespace(status_code=status)
    return error


def test_what_the_hub_refuses_is_final_and_what_fails_for_a_while_is_not() -> None:
    final = [status for status in (None, *range(400, 600)) if is_final(refusal(status))]
    assert final == [400, 401, 403, 404, 409, 422]
    assert [status_of(refusal(status)) for status in (None, 503)] == [None, 503]


@pytest.mark.parametrize(
    ("status", "text", "reason"),
    [
        (401, "x", "the token is not accepted"),
        (403, "x", "the token may not write there"),
        (500, "\n  the first line \nthe second", "the first line"),
        (None, "", "RuntimeError"),
    ],
)
def test_an_error_of_the_hub_is_one_line(status: int | None, text: str, reason: str) -> None:
    assert reason_of(refusal(status, text)) == reason


@pytest.mark.parametrize(
    ("role", "may_write"), [("write", True), ("admin", True), ("contributor", True), ("read", False), (None, False)]
)
def test_the_role_in_an_organization_decides(role: str | None, may_write: bool) -> None:
    me = {"name": "me", "orgs": [{"name": "house", "roleInOrg": role}, {"name": "other", "roleInOrg": "write"}]}
    assert (not list(access_problems(me, "house/x"))) == may_write
    assert list(access_problems(me, "x")) == []
    [problem] = access_problems(me, "strangers/x")
    assert problem.allowed == f"NAME, or of: me, {'house, ' * may_write}other"


@pytest.mark.parametrize(
    ("keys", "lycoris", "kind"),
    [
        ({"model_type": "full"}, None, "full"),
        ({"lora_type": "lycoris"}, {"algo": "loha"}, "loha"),
        ({"lora_type": "standard"}, None, "lora"),
        ({"lora_type": "standard", "use_dora": True}, None, "dora"),
    ],
)
def test_what_was_trained_is_named_on_the_card(keys, lycoris, kind) -> None:
    assert kind_of(SimpleNamespace(config=config(**keys), lycoris=lycoris)) == kind
