"""Numbers in webhooks, worked out by hand."""

from __future__ import annotations

import pytest

from simpletuner.reporting.events import StepDone
from simpletuner.reporting.webhooks.breaker import Breaker, Patience
from simpletuner.reporting.webhooks.messages import CurvePoint, progress_message


def test_progress_says_what_is_done_and_what_is_left():
    """30 of 120 steps; the last ones took 2 s each, so 90 more take 180 s."""
    steps = [StepDone(number, 120, 0.5, 1e-4, None, 2.0, 4, 1) for number in range(28, 31)]
    message = progress_message(steps[-1], "run", [CurvePoint.of(step) for step in steps])
    assert message.data["percent"] == 25
    assert message.data["eta_seconds"] == 180
    assert [row[0] for row in message.data["curve"]] == [28, 29, 30]
    assert message.title == "step 30 of 120"


def test_pauses_double_up_to_the_longest_and_begin_again_after_a_success():
    breaker = Breaker(Patience(first=1.0, longest=5.0, tries=3))
    for longest in (1, 2, 4, 5, 5):
        assert longest / 2 <= breaker.failed() <= longest  # spread over the upper half
    assert breaker.is_open
    assert breaker.worked()
    assert not breaker.is_open
    assert breaker.failed(retry_after=60.0) == pytest.approx(60)
