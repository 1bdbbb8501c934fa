"""Numbers in webhooks, worked out by hand."""

from __future__ import annotations

import ssl

import pytest
from pydantic import SecretStr
from tenacity import RetryCallState, Retrying

from simpletuner.config.webhooks import Webhook
from simpletuner.reporting.webhooks.messages import CurvePoint, progress_message
from simpletuner.reporting.webhooks.sender import Patience
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
