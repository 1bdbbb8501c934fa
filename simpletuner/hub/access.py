"""Whether an upload can succeed, asked before anything is encoded or trained: who we are, and may we write there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from simpletuner.config.options import TrainConfig
from simpletuner.errors import ConfigError, Problem
from simpletuner.hub.client import is_final, make_api, reason_of, upload_failures
from simpletuner.hub.job import repository_name
from simpletuner.text import without_login

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "run: hf auth login, with a token that has write permission; or set HF_TOKEN"
WRITING_ROLES = ("write", "admin", "contributor")


def check_access(config: TrainConfig, environment: Mapping[str, str], api: HfApi | None = None) -> list[str]:
    """Ask the Hub who we are, and raise where we may not write.

    Returns:
        What is worth a warning: the Hub does not answer now.

    Raises:
        ConfigError: nobody is logged in, or the token or its owner may not write there.
    """
    if not config.reporting.push_to_hub:
        return []
    if environment.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise ConfigError(
            Problem("HF_HUB_OFFLINE is set: nothing can be uploaded", key="push_to_hub", fix="unset it, or the key")
        )
    api = api or make_api()
    try:
        me = api.whoami()
    except upload_failures() as error:
        if is_final(error):
            raise ConfigError(Problem(f"{_where(api)}: {reason_of(error)}", key="push_to_hub", fix=LOGIN)) from error
        if _has_no_token(api):
            raise ConfigError(Problem("nobody is logged in to the Hub", key="push_to_hub", fix=LOGIN)) from error
        return [f"{_where(api)} does not answer now ({reason_of(error)}); uploads are retried during the run"]
    problems = list(access_problems(me, repository_name(config)))
    if problems:
        raise ConfigError(problems)
    return []


def full_name(me: Mapping[str, Any], name: str) -> str:
    """The repository's name with its owner, who is the user where no other is named."""
    return name if "/" in name else f"{me['name']}/{name}"


def access_problems(me: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """What keeps the owner of the token from writing into a repository; `me` is what `whoami` says."""
    token = (me.get("auth") or {}).get("accessToken") or {}
    role = token.get("role")
    owner = full_name(me, name).split("/")[0]
    if role == "read":
        yield Problem(f"the token of {me['name']} can only read", key="push_to_hub", fix=LOGIN)
    elif role == "fineGrained" and not _may_write(token.get("fineGrained") or {}, owner):
        fix = f"give it the permission to write to repositories of {owner}, or use another token"
        yield Problem(f"the token of {me['name']} may not write to repositories of {owner}", "push_to_hub", fix=fix)
    organizations = {each.get("name"): each.get("roleInOrg") for each in me.get("orgs") or ()}
    if owner != me["name"] and organizations.get(owner) not in WRITING_ROLES:
        known = ", ".join([me["name"], *(org for org, role in organizations.items() if role in WRITING_ROLES)])
        yield Problem(f'{me["name"]} may not write to "{owner}"', key="hub_model_id", allowed=f"NAME, or of: {known}")


def _may_write(rights: Mapping[str, Any], owner: str) -> bool:
    """Whether a token of single rights has that of writing somewhere at the owner's."""
    scoped = rights.get("scoped") or ()
    return any(
        "repo.write" in (each.get("permissions") or ())
        and str((each.get("entity") or {}).get("name", owner)).split("/")[0] == owner
        for each in scoped
    )


def _has_no_token(api: HfApi) -> bool:
    from huggingface_hub import get_token

    return not (api.token or get_token())


def _where(api: HfApi) -> str:
    return "the Hub" if api.endpoint == "https://huggingface.co" else f"the Hub at {without_login(api.endpoint)}"
