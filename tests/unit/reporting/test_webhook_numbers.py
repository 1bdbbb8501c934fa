"""Numbers in webhooks, worked out by hand."""

from __future__ import annotations

import json
import logging
import ssl
from pathlib import Path

import pytest
from PIL import Image
from pydantic import SecretStr
from tenacity import RetryCallState, Retrying

from simpletuner.config.webhooks import Webhook
from simpletuner.reporting.webhooks.encoding import encode
from simpletuner.reporting.webhooks.images import load_images
from simpletuner.reporting.webhooks.messages import CurvePoint, Message, progress_message
from simpletuner.reporting.webhooks.sender import Patience
from simpletuner.reporting.webhooks.spool import Spool, created_at, message_id
from simpletuner.reporting.webhooks.transport import Deadlines, DeliveryFailed, Transport, retry_after
from tests.events import step_done


def test_progress_says_what_is_done_and_what_is_left():
    """30 of 120 steps; the last ones took 2 s each, so 90 more take 180 s."""
    steps = [step_done(number, total_steps=120, seconds=2.0) for number in range(28, 31)]
    message = progress_message(steps[-1], "run", [CurvePoint.of(step) for step in steps])
    assert message.data["percent"] == 25
    assert message.data["eta_seconds"] == 180
    assert [row[0] for row in message.data["curve"]] == [28, 29, 30]
    assert message.title == "step 30 of 120"
    slow_first = [step_done(number, total_steps=120, seconds=9.0 if number < 11 else 1.0) for number in range(1, 31)]
    points = [CurvePoint.of(step) for step in slow_first]
    assert progress_message(steps[-1], "run", points).data["eta_seconds"] == 90, "the pace of the last 20 alone"
    assert progress_message(steps[-1], "run", []).data["eta_seconds"] == 180


def pauses(patience: Patience, error: Exception, count: int) -> list[float]:
    """The pause after each of the first failures, as tenacity asks for it."""
    found = []
    for number in range(1, count + 1):
        state = RetryCallState(Retrying(), None, (), {})
        state.attempt_number = number
        state.set_exception((type(error), error, None))
        found.append(patience.pause(state))
    return found


def test_pauses_double_up_to_the_longest_and_are_spread():
    rounds = [pauses(Patience(first=1.0, longest=5.0), DeliveryFailed("down"), 5) for _ in range(300)]
    for limit, *found in zip((1, 2, 4, 5, 5), *rounds, strict=True):
        assert 0.9 * limit < max(found) <= limit
        assert min(found) < 0.2 * limit


def test_a_service_is_never_asked_before_it_wants_to_be():
    assert min(pauses(Patience(first=1.0, longest=5.0), DeliveryFailed("busy", retry_after=60.0), 5)) == 60


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7), ("0.5", 0.5), ("-3", 0), ("nan", 0), ("1e9", 900), ("Mon, 01 Jan 2001 00:00:00 GMT", 0)],
)
def test_a_service_may_ask_for_a_pause_of_up_to_a_quarter_of_an_hour(header: str, seconds: float):
    assert retry_after(header) == seconds
    assert retry_after("soon") is retry_after(None) is None


@pytest.mark.parametrize(
    ("url", "keys", "mode"),
    [
        ("https://hooks.example/x", {}, ssl.CERT_REQUIRED),
        ("HTTPS://hooks.example/x", {}, ssl.CERT_REQUIRED),
        ("https://hooks.example/x", {"ssl_no_verify": True}, ssl.CERT_NONE),
    ],
)
def test_certificates_are_checked_however_an_address_is_spelled(url: str, keys: dict[str, bool], mode: ssl.VerifyMode):
    transport = Transport(Webhook(webhook_type="raw", callback_url=SecretStr(url), **keys), Deadlines())
    assert transport._client._transport._pool._ssl_context.verify_mode == mode  # type: ignore[attr-defined]


def test_images_share_what_a_service_takes(tmp_path: Path):
    paths = [str(tmp_path / f"{number}.png") for number in range(2)]
    for path in paths:
        Image.effect_noise((64, 64), 90).save(path)
    sizes = [Path(path).stat().st_size for path in paths]
    whole = load_images(paths, sum(sizes))
    assert [each.data for each in whole if each] == [Path(path).read_bytes() for path in paths]
    smaller = load_images([*paths, str(tmp_path / "gone.png")], sum(sizes) - 1)
    assert [each is None for each in smaller] == [False, False, True]
    assert sum(len(each.data) for each in smaller if each) < sum(sizes)


def test_a_waiting_message_is_as_old_as_it_was_when_it_was_made(tmp_path: Path):
    message = Message("error", "error", "t", "x", {}, created=1_764_400_000.25)
    spool = Spool(tmp_path / "spool", tmp_path)
    spool.add(message)
    [name] = spool.names()
    assert (created_at(name), message_id(name)) == (1_764_400_000.25, message.id)


def test_an_address_stays_out_of_the_log_as_httpx_writes_it_too():
    """httpx writes a host in small letters, and a space as %20."""
    webhook = Webhook(webhook_type="raw", callback_url=SecretStr("http://Hooks.example/s3 cret"))
    transport = Transport(webhook, Deadlines())
    record = logging.LogRecord("httpx", logging.INFO, "", 0, "POST %s", ("http://hooks.example/s3%20cret",), None)
    assert not transport._log_filter.filter(record)


@pytest.mark.parametrize("length", [10, 1990, 5000])
def test_a_message_for_discord_has_at_most_2000_characters_with_its_note(length: int):
    target = Webhook(webhook_type="discord", webhook_url=SecretStr("https://discord.com/api/webhooks/1/x"))
    message = Message("validation.image", "info", "images", "x" * length, run_name="run")
    content = json.loads(encode(target, message, [None, None]).content)["content"]
    assert content.endswith("\n(2 of 2 images could not be sent)")
    assert len(content) == min(2000, len("`(run)` **images**\n") + length + len("\n(2 of 2 images could not be sent)"))
