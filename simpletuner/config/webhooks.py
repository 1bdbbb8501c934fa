"""The services that a run tells what it does: every key of a webhook, declared once.

Addresses are secrets themselves: who has the URL of a Discord webhook can post with it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from simpletuner.config.options.declare import REQUIRED, OptionInfo, describe_field, option
from simpletuner.config.values import Bool, FilePath, Secret, Text

Severity = Literal["debug", "info", "warning", "error", "critical"]
SEVERITIES: tuple[Severity, ...] = ("debug", "info", "warning", "error", "critical")


class Webhook(BaseModel):
    """One service that gets events."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    webhook_type: Literal["discord", "raw"] = option(
        REQUIRED, help="`discord`: messages for people in a Discord channel. `raw`: events as JSON, for programs."
    )
    webhook_url: Secret | None = option(
        None, help="Of `discord`: the URL that Discord shows under Integrations. `${NAME}` takes it from a variable."
    )
    callback_url: Secret | None = option(
        None, help="Of `raw`: the URL that events are posted to. `${NAME}` takes it from an environment variable."
    )
    auth_token: Secret | None = option(
        None, help="Of `raw`: sent in the header `X-API-Key`. `${NAME}` takes it from an environment variable."
    )
    auth_token_file: FilePath | None = option(
        None, help="Of `raw`: a file that holds the token, in place of `auth_token`.", path="input"
    )
    message_prefix: Text | None = option(
        None, help="Text before Discord messages and in `prefix` of raw events, to distinguish runs."
    )
    log_level: Severity = option("info", help="Only events of this severity and above are sent.")
    ssl_no_verify: Bool = option(False, help="Accept any certificate: for services of your own that signed theirs.")

    @property
    def url(self) -> str:
        """Where to post to. Never to be shown."""
        url = self.webhook_url or self.callback_url
        assert url is not None
        return url.get_secret_value()


@dataclass(frozen=True)
class Webhooks:
    """All services of a run, with their secrets looked up.

    Args:
        job_id: of `SIMPLETUNER_JOB_ID`; raw events carry it.
        reporting_interval: optimizer steps between reports of progress; None: by time.
    """

    targets: tuple[Webhook, ...] = ()
    job_id: str | None = None
    reporting_interval: int | None = None


@functools.cache
def webhook_options() -> Mapping[str, OptionInfo]:
    """The declarations of a webhook's keys."""
    return {name: describe_field(name, info, "webhook") for name, info in Webhook.model_fields.items()}
