"""Numbers in webhooks, worked out by hand."""

from __future__ import annotations

from tenacity import RetryCallState, Retrying

from simpletuner.reporting.webhooks.messages import CurvePoint, progress_message
from simpletuner.reporting.webhooks.sender import Patience
from simpletuner.reporting.webhooks.transport import DeliveryFailed
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
