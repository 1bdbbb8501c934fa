"""`webhook_config` in each of its forms; faults are reported at the start, without secrets."""

from __future__ import annotations

import json
from typing import Any
from unittest import mock

import pytest

from simpletuner.config.discovery import ConfigSource
from simpletuner.config.loading import load_source
from simpletuner.config.reference import resolved_text

from .conftest import Workspace, find_spec

CANARY = "canary-7d1f"
RAW = {"webhook_type": "raw", "callback_url": f"https://example.org/{CANARY}"}
DISCORD = {"webhook_type": "discord", "webhook_url": f"https://discord.com/api/webhooks/1/{CANARY}"}


@pytest.mark.parametrize("form", ["object", "text", "file", "list", "list as text", "list in a file"])
def test_each_form_gives_the_same_webhook(workspace: Workspace, form: str) -> None:
    written: Any = {
        "object": RAW,
        "text": json.dumps(RAW),
        "file": "config/webhook.json",
        "list": [RAW, DISCORD],
        "list as text": json.dumps([RAW, DISCORD]),
        "list in a file": "config/webhook.json",
    }[form]
    workspace.put("config/webhook.json", [RAW, DISCORD] if "list" in form else RAW)
    workspace.config["webhook_config"] = written
    run = workspace.load_written()
    assert [target.url for target in run.webhooks.targets][:1] == [RAW["callback_url"]]
    assert len(run.webhooks.targets) == (2 if "list" in form else 1)
    for shown in (json.dumps(run.resolved()), resolved_text(run), repr(run), str(run.webhooks)):
        assert CANARY not in shown


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"webhook_type": "slack"}, "webhook_type", "discord, raw"),
        ({"callback_url": None}, "callback_url", "webhook_type raw needs it"),
        ({"callback_url": f"ftp://{CANARY}/x"}, "callback_url", "does not begin with http"),
        ({"callback_url": f"https:///{CANARY}"}, "callback_url", "names no host"),
        ({"callback_url": f"https://h:{CANARY}/"}, "callback_url", "is no URL"),
        ({"callback_url": f"https://h/{CANARY} x"}, "callback_url", "a space"),
        ({"webhook_url": f"https://h/{CANARY}"}, "webhook_url", 'write "callback_url"'),
        ({"auth_token": "a", "auth_token_file": "token"}, "auth_token_file", "keep one"),
        ({"auth_token_file": "gone"}, "auth_token_file", "no file of this name"),
        ({"auth_token_file": "blank"}, "auth_token_file", "is empty"),
        ({"auth_token_file": "bytes"}, "auth_token_file", "UTF-8"),
        ({"auth_token": f"{CANARY}\n{CANARY}"}, "auth_token", "no header"),
        ({"auth_token": "${GONE}"}, "auth_token", "GONE is not set"),
        ({"auth_tokn": CANARY}, "auth_tokn", 'did you mean "auth_token"'),
        ({"log_level": "loud"}, "log_level", "debug, info, warning"),
        ({"ssl_no_verify": "perhaps"}, "ssl_no_verify", "true or false"),
    ],
)
def test_what_is_wrong_is_reported_without_secrets(
    workspace: Workspace, changes: dict[str, Any], key: str, words: str
) -> None:
    workspace.put("token", "t")
    workspace.put("blank", " \n")
    workspace.put("bytes", "").write_bytes(b"t\xff")
    workspace.config["webhook_config"] = "config/webhook.json"
    workspace.put("config/webhook.json", [DISCORD, RAW | changes])
    (problem,) = workspace.fails_written().problems
    assert problem.key == f"webhook_config[2].{key}"
    assert (problem.file, problem.line) > ("config/webhook.json", 1)
    assert words in problem.render()
    assert CANARY not in problem.render()
    workspace.config["webhook_config"] = RAW | changes
    (problem,) = workspace.fails_written().problems
    assert (problem.key, problem.file) == (f"webhook_config.{key}", "config/config.json")
    assert CANARY not in problem.render()


@pytest.mark.parametrize("written", ["[", "{'a': 1}", "gone.json", 3, [], [[]]])
def test_what_is_no_webhook_at_all_is_refused(workspace: Workspace, written: Any) -> None:
    workspace.config["webhook_config"] = written
    (problem,) = workspace.fails_written().problems
    assert (problem.key or "").startswith("webhook_config")


def test_a_discord_webhook_has_its_token_in_the_url(workspace: Workspace) -> None:
    workspace.config["webhook_config"] = DISCORD | {"auth_token": CANARY}
    (problem,) = workspace.fails_written().problems
    assert "part of its URL" in problem.render()


def test_secrets_come_from_variables_and_files(workspace: Workspace) -> None:
    workspace.environment |= {"HOOK": DISCORD["webhook_url"], "SIMPLETUNER_JOB_ID": "job-7"}
    workspace.put("secrets/token", f"{CANARY}\n")
    discord = {"webhook_type": "discord", "webhook_url": "${HOOK}"}
    workspace.config |= {"webhook_config": [discord, RAW | {"auth_token_file": "secrets/token"}]}
    run = workspace.load_written()
    first, second = run.webhooks.targets
    assert first.url == DISCORD["webhook_url"]
    assert second.auth_token is not None
    assert second.auth_token.get_secret_value() == CANARY
    assert run.webhooks.job_id == "job-7"
    assert run.warnings == ()


def test_who_judges_a_file_alone_still_looks_up_its_variables(workspace: Workspace) -> None:
    workspace.config["webhook_config"] = {"webhook_type": "raw", "callback_url": "${HOOK}"}
    workspace.write()
    source = ConfigSource(workspace.root / "config/config.json", "json")
    with mock.patch("simpletuner.config.loading.get_spec", find_spec):
        found = load_source(source, (), {}, workspace.root, variables={"HOOK": RAW["callback_url"]})
    assert found.webhooks.targets[0].url == RAW["callback_url"]


def test_a_token_that_travels_in_the_open_is_reported(workspace: Workspace) -> None:
    workspace.config["webhook_config"] = RAW | {"callback_url": "http://example.org/x", "auth_token": CANARY}
    (warning,) = workspace.load_written().warnings
    assert "unencrypted" in warning
    workspace.config["webhook_config"] = RAW | {"callback_url": "http://127.0.0.1:1/x", "auth_token": CANARY}
    assert workspace.load_written().warnings == ()


def test_an_interval_without_a_webhook_is_reported(workspace: Workspace) -> None:
    workspace.config["webhook_reporting_interval"] = 5
    (warning,) = workspace.load_written().warnings
    assert "no webhook_config" in warning
