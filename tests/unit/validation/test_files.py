from __future__ import annotations

from simpletuner.validation.files import spread


def test_a_long_run_is_shown_by_evenly_spread_steps_and_its_last():
    assert spread(list(range(100, 1100, 100)), 4) == [100, 400, 700, 1000]
    assert spread([100, 200], 4) == [100, 200]
    assert spread([100, 200, 300], 1) == [300]
