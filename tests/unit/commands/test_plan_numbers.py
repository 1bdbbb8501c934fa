"""What `simpletuner plan` counts and decides, by hand, without a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simpletuner.commands import plan as planning
from simpletuner.commands.text import columns, short_count


def test_a_count_begins_each_unit_at_one() -> None:
    assert [short_count(n) for n in (999, 1e3, 1e6, 1e9)] == ["999", "1.00 k", "1.00 M", "1.00 B"]


@pytest.mark.parametrize(
    ("needed", "wanted", "reason"),
    [
        (90, None, ""),
        (91, None, "the memory that is needed is not available on cpu"),
        (91, True, ""),
        (1, False, "--no-probe"),
    ],
)
def test_steps_are_timed_where_a_tenth_of_the_memory_is_left(needed: int, wanted: bool | None, reason: str) -> None:
    family: Any = SimpleNamespace(device=torch.device("cpu"), source=SimpleNamespace(is_local=True))
    assert planning.why_no_probe(family, needed, 100, 0.0, wanted) == reason


def test_of_a_long_epoch_batches_are_counted_all_along_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four, of which the first half is small."""

    def batch(epoch: int, position: int) -> SimpleNamespace:
        return SimpleNamespace(sample_indices=(0,), size=(64, 64 if position < 2 else 128), dataset_id="images")

    monkeypatch.setattr(planning, "MAX_BATCHES", 2)
    loads = planning.count_loads([], SimpleNamespace(batches_in=lambda epoch: 4, batch=batch))  # type: ignore[arg-type]
    assert {(load.height, load.width): count for load, count in loads.items()} == {(64, 64): 1, (64, 128): 1}


def test_columns_are_as_wide_as_their_widest_text() -> None:
    assert columns([("a", "1"), ("long", "22"), ("b", "3")]) == ["  a      1", "  long  22", "  b      3"]
    assert columns([]) == []
