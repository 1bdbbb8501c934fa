"""Reads `webhook_config`: an object, a list of them, the same as JSON text, or the path of a file that holds it.

No message here shows an address or a token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from simpletuner.config.checking import check_settings
from simpletuner.config.json_reader import Document, parse_json, read_json_file, read_text_file
from simpletuner.config.layers import Origin, Setting
from simpletuner.config.merging import unknown_key
from simpletuner.config.paths import Folders
from simpletuner.config.webhooks import Webhook, webhook_options
from simpletuner.errors import ConfigError, Problem

KEY = "webhook_config"

Fail = Callable[..., None]

_VARIABLE = re.compile(r"\$\{(\w+)\}")
# The key that each type takes its address from; the other one is a mistake.
_URL_KEYS = {"discord": "webhook_url", "raw": "callback_url"}


@dataclass
class _Reader:
    origin: Origin
    folders: Folders
    environment: Mapping[str, str]
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def read_webhooks(
    written: Path | SecretStr | None,
    origin: Origin,
    folders: Folders,
    environment: Mapping[str, str],
    check_files: bool = True,
) -> tuple[tuple[Webhook, ...], list[Problem], list[str]]:
    """The services of `webhook_config`.

    Args:
        written: the option's value.
        origin: where the option stands.
        environment: that `${NAME}` is looked up in.
        check_files: False where files and variables need not be there (`options --resolved`).

    Returns:
        targets, problems, and warnings.
    """
    if written is None:
        return (), [], []
    reader = _Reader(origin, folders, environment)
    try:
        document = _document(written, reader)
    except ConfigError as error:
        return (), error.problems if check_files else [], []
    entries = document.value if isinstance(document.value, list) else [document.value]
    targets = []
    for index, entry in enumerate(entries):
        path: tuple[int, ...] = (index,) if isinstance(document.value, list) else ()
        target = _read_target(entry, document, path, reader)
        if target is not None:
            targets.append(target)
    if not entries:
        reader.problems.append(origin.problem("is an empty list", KEY, "at least one webhook", "remove the key"))
    return tuple(targets), reader.problems if check_files else [], reader.warnings


def _document(written: Path | SecretStr, reader: _Reader) -> Document:
    """The JSON value, with lines where it is a file of its own."""
    if isinstance(written, SecretStr):
        try:
            return parse_json(written.get_secret_value(), KEY)
        except ConfigError as error:
            raise ConfigError(reader.origin.problem(error.problems[0].message, KEY, "JSON")) from None
    path = reader.folders.find(written)
    if path is None:
        raise ConfigError(reader.folders.missing(written, KEY, reader.origin, "file"))
    return read_json_file(path, reader.folders.shown(path), KEY)


def _read_target(entry: Any, document: Document, path: tuple[int, ...], reader: _Reader) -> Webhook | None:
    name = KEY + "".join(f"[{index + 1}]" for index in path)
    is_file = document.file != KEY

    def place(*keys: str) -> Origin:
        return Origin("file", document.file, document.line(*path, *keys)) if is_file else reader.origin

    if not isinstance(entry, dict):
        which = f"entry {path[0] + 1} is" if path else "is"
        reader.problems.append(place().problem(f"{which} not an object", KEY, '{"webhook_type": ..., ...}'))
        return None
    infos = webhook_options()
    settings = {key: Setting(key, value, place(key)) for key, value in entry.items() if value not in (None, "")}
    before = len(reader.problems)
    for key in [key for key in settings if key not in infos]:
        reader.problems.append(unknown_key(settings.pop(key), infos, f"{name}.", {}))
    target, problems = check_settings(Webhook, infos, settings, place(), f"{name}.")
    reader.problems += problems
    if target is None or len(reader.problems) > before:
        return None

    def fail(message: str, key: str, allowed: str | None = None, fix: str | None = None) -> None:
        reader.problems.append(place(key).problem(message, f"{name}.{key}", allowed, fix))

    target = _with_secrets(target, reader, fail)
    _check_target(target, fail)
    if len(reader.problems) > before:
        return None
    if target.auth_token and not _is_private(target.url):
        where = place("callback_url")
        reader.warnings.append(f"{where}: {name}: the token travels unencrypted: the address begins with http://")
    return target


def _with_secrets(target: Webhook, reader: _Reader, fail: Fail) -> Webhook:
    """`${NAME}` replaced by the variable's value, and the token read from its file."""
    updates: dict[str, Any] = {}
    for key in ("webhook_url", "callback_url", "auth_token"):
        secret = getattr(target, key)
        match = _VARIABLE.fullmatch(secret.get_secret_value().strip()) if secret else None
        if match:
            value = reader.environment.get(match[1], "").strip()
            updates[key] = SecretStr(value) if value else None
            if not value:
                fail(f"the environment variable {match[1]} is not set", key, fix=f"export {match[1]}=...")
    if target.auth_token_file is not None and target.auth_token is not None:
        fail("auth_token is set too", "auth_token_file", fix="keep one of them")
    elif target.auth_token_file is not None:
        updates["auth_token"] = _token_of(target.auth_token_file, reader, fail)
    return target.model_copy(update=updates)


def _token_of(file: Path, reader: _Reader, fail: Fail) -> SecretStr | None:
    path = reader.folders.find(file)
    if path is None:
        places = " or ".join(str(place) for place in reader.folders.places(file))
        fail(f'"{file}": there is no file of this name', "auth_token_file", f"file at {places}")
        return None
    try:
        token = read_text_file(path, str(path)).strip()
    except ConfigError as error:
        fail(f'"{file}" {error.problems[0].message}', "auth_token_file")
        return None
    if not token:
        fail(f'"{file}" is empty', "auth_token_file", "a file that holds the token")
    return SecretStr(token)


def _check_target(target: Webhook, fail: Fail) -> None:
    wanted = _URL_KEYS[target.webhook_type]
    for key in _URL_KEYS.values():
        if key != wanted and getattr(target, key) is not None:
            fail(f"belongs to another webhook_type than {target.webhook_type}", key, fix=f'write "{wanted}"')
    url = getattr(target, wanted)
    if url is None:
        fail(f"is missing: webhook_type {target.webhook_type} needs it", wanted, "a URL", "set it")
    elif fault := _url_fault(url.get_secret_value()):
        fail(f"the value {fault}", wanted, "http(s)://host[:port]/path")
    if target.webhook_type == "discord" and (target.auth_token or target.auth_token_file):
        key = "auth_token_file" if target.auth_token_file else "auth_token"
        fail("has no use: the token of a Discord webhook is part of its URL", key, fix="remove the key")
    token = target.auth_token.get_secret_value() if target.auth_token else ""
    if not token.isascii() or not token.isprintable():
        key = "auth_token_file" if target.auth_token_file else "auth_token"
        fail("the token holds characters that no header can carry", key, "printable ASCII")


def _url_fault(url: str) -> str | None:
    """What is wrong with an address, in words that do not show it."""
    if not url.isprintable() or " " in url:
        return "contains a space or a character that no URL has"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - looks whether it is a number
    except ValueError:
        return "is no URL"
    if parts.scheme not in ("http", "https"):
        return "does not begin with http:// or https://"
    return None if parts.hostname else "names no host"


def _is_private(url: str) -> bool:
    """Whether nobody on the way can read what is sent."""
    parts = urlsplit(url)
    return parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")
