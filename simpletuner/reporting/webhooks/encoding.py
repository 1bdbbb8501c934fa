"""A message as the body of a request: JSON with images inside for programs, text with files for Discord."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from simpletuner.config.webhooks import SEVERITIES, Webhook
from simpletuner.reporting.webhooks.images import Attachment
from simpletuner.reporting.webhooks.messages import SCHEMA_VERSION, Message

# Discord: 2000 characters, ten files, 10 MB. A raw receiver has no known limit; base64 adds a third.
IMAGE_BYTES = {"discord": 9_500_000, "raw": 8_000_000}
_DISCORD_CHARACTERS = 2000
_FOR_PROGRAMS = ("lifecycle.stage", "training.loss_by_sigma")
_SIGNS = {"warning": "⚠️ ", "error": "❌ ", "critical": "❌ "}


@dataclass(frozen=True)
class Body:
    """What is posted: JSON, or a form with a JSON field and files."""

    content: bytes
    files: Sequence[Attachment] = ()


def accepts(target: Webhook, message: Message) -> bool:
    """Whether a service gets this: by `log_level`; people in Discord see stages only at level debug."""
    if target.webhook_type == "discord" and message.type in _FOR_PROGRAMS:
        return target.log_level == "debug"
    return SEVERITIES.index(message.severity) >= SEVERITIES.index(target.log_level)


def encode(
    target: Webhook, message: Message, attachments: Sequence[Attachment | None], job_id: str | None = None
) -> Body:
    """The body for one service.

    Args:
        attachments: one for each of the message's images; None for one that could not be loaded or is left out.
    """
    return _ENCODERS[target.webhook_type](target, message, attachments, job_id)


def raw_event(
    target: Webhook, message: Message, attachments: Sequence[Attachment | None], job_id: str | None
) -> dict[str, Any]:
    """The structured event; `image` of each of `data.pictures` is the index in `images`, null where it is missing."""
    data = dict(message.data)
    if "pictures" in data:
        indices = iter(range(len(attachments)))
        data["pictures"] = [
            {**facts, "image": next(indices) if attachment else None}
            for facts, attachment in zip(data["pictures"], attachments, strict=True)
        ]
    return {
        "schema_version": SCHEMA_VERSION,
        "id": message.id,
        "type": message.type,
        "severity": message.severity,
        "title": message.title,
        "message": message.text,
        "run_name": message.run_name,
        "run_id": message.run_id or None,
        "prefix": target.message_prefix,
        "job_id": job_id,
        "timestamp": datetime.fromtimestamp(message.created, UTC).isoformat(timespec="milliseconds"),
        "data": data,
        "images": [_data_uri(attachment) for attachment in attachments if attachment],
    }


def _raw(target: Webhook, message: Message, attachments: Sequence[Attachment | None], job_id: str | None) -> Body:
    event = raw_event(target, message, attachments, job_id)
    return Body(json.dumps(event, allow_nan=False).encode())


def _data_uri(attachment: Attachment) -> str:
    return f"data:{attachment.media_type};base64,{base64.b64encode(attachment.data).decode()}"


def _discord(target: Webhook, message: Message, attachments: Sequence[Attachment | None], job_id: str | None) -> Body:
    head = f"`({target.message_prefix or message.run_name})` " if target.message_prefix or message.run_name else ""
    text = f"{head}{_SIGNS.get(message.severity, '')}**{message.title}**"
    if message.text:
        text += f"\n{message.text}"
    missing = sum(attachment is None for attachment in attachments)
    note = f"\n({missing} of {len(attachments)} images could not be sent)" if missing else ""
    text = f"{_shortened(text, _DISCORD_CHARACTERS - len(note))}{note}"
    # A prompt with an @ in it calls nobody.
    payload = {"content": text, "allowed_mentions": {"parse": []}}
    files = [attachment for attachment in attachments if attachment]
    return Body(json.dumps(payload).encode(), files)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."


_Encoder = Callable[[Webhook, Message, Sequence[Attachment | None], str | None], Body]
_ENCODERS: Mapping[str, _Encoder] = {"raw": _raw, "discord": _discord}
