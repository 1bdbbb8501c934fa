"""Which images of a dataset are shown to people: spread over its sizes and its paths."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from simpletuner.data.tiles import spread


def test_images_are_taken_from_all_sizes_and_from_all_over_their_paths() -> None:
    """Of 12 images 4: ten of one size give three, a third of them apart; two of another give one."""
    dataset: Any = SimpleNamespace(buckets={(64, 64): np.arange(2, 12), (64, 96): np.arange(2)})
    assert spread(dataset, 4) == [2, 5, 8, 0]
    assert spread(dataset, 1) == [2]
    assert spread(dataset, 99) == [*range(2, 12), 0, 1]
