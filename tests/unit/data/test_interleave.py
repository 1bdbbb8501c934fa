"""The mixed order of streams, asked for place by place and by stream."""

from __future__ import annotations

import numpy as np
import pytest

from simpletuner.data.interleave import SEGMENT_ITEMS, Interleaving


@pytest.mark.parametrize("seed", range(3))
def test_the_next_batch_of_a_stream_is_the_first_one_from_there_on(seed: int) -> None:
    """Read off the whole order, over the edges of its segments."""
    counts = (2 * SEGMENT_ITEMS, SEGMENT_ITEMS, 3)
    mix = Interleaving(counts, seed)
    order = [mix.at(position)[0] for position in range(mix.total)]
    for wanted in range(len(counts)):
        chosen = np.arange(len(counts)) == wanted
        for position in range(mix.total):
            expected = next((place for place in range(position, mix.total) if order[place] == wanted), None)
            assert mix.next_of(position, chosen) == expected
