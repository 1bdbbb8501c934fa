"""Which blocks are recomputed: at an interval, and as memory demands, on hand numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from simpletuner.training.gradient_checkpointing import GradientCheckpointing, MeasuredMemory, count_fitting
from tests.configs import config_of

CPU = torch.device("cpu")


def made_of(limit: int | None = None, may_keep_least: bool = False, **options: Any) -> GradientCheckpointing | None:
    config = config_of(**{"gradient_checkpointing": True, **options})
    return GradientCheckpointing.of(config, CPU, limit, may_keep_least=may_keep_least)


def runs_of(checkpointing: GradientCheckpointing, blocks: Sequence[Any], counts: list[int]) -> list[int]:
    """How often each block runs in one step, forward and backward."""
    counts[:] = [0] * len(blocks)
    value = torch.ones(4, requires_grad=True)
    for block in blocks:
        value = checkpointing(block, value)
    value.sum().backward()
    return list(counts)


def test_the_first_of_every_so_many_blocks_runs_twice_and_the_last_of_all_once() -> None:
    counts: list[int] = []

    def block_of(index: int) -> Any:
        def block(value: Tensor) -> Tensor:
            counts[index] += 1
            return value.exp()

        return block

    blocks = [block_of(index) for index in range(7)]
    every_third = made_of(gradient_checkpointing_interval="3")
    assert every_third is not None
    assert runs_of(every_third, blocks, counts) == [2, 1, 1, 2, 1, 1, 2]  # nobody knows yet which is the last
    assert runs_of(every_third, blocks, counts) == [2, 1, 1, 2, 1, 1, 1]
    every_one = made_of()
    assert every_one is not None
    runs_of(every_one, blocks, counts)
    assert runs_of(every_one, blocks, counts) == [2, 2, 2, 2, 2, 2, 1]


def test_blocks_are_treated_as_they_are_configured() -> None:
    assert made_of(gradient_checkpointing=False) is None
    plain = made_of(gradient_checkpointing_backend="torch")
    assert plain is not None
    assert (plain.offloading, plain.room, plain.level) == (None, None, "low")
    options = {"gradient_checkpointing_backend": "unsloth", "gradient_checkpointing_interval": "auto"}
    full = made_of(limit=5, may_keep_least=True, **options, activation_memory="high")
    assert full is not None
    assert full.offloading is not None
    assert full.room is not None
    assert (full.room.limit, full.room.may_keep_least, full.level) == (5, True, "high")


@pytest.mark.parametrize(
    ("free", "measured", "expected"),
    [(100, 0, 9), (99, 0, 8), (100, 10, 10), (0, 30, 3), (0, 29, 2), (-50, 30, 3), (-50, 0, 1), (1000, 0, 20)],
)
def test_blocks_keep_what_nine_tenths_of_the_free_memory_hold(free: int, measured: int, expected: int) -> None:
    """Twenty blocks of ten bytes each."""
    assert count_fitting(free, [10] * 20, measured) == expected
    assert count_fitting(free, [], measured) == 0


TEXT, SMALL, LARGE = (torch.ones(count) for count in (25, 100, 1000))


def step(memory: MeasuredMemory, *inputs: Tensor) -> list[bool]:
    """One pass in which each block keeps its own output; which of them were recomputed."""
    recomputed = []
    for index, given in enumerate(inputs):
        is_recomputed, count = memory.ask(index, [given])
        recomputed.append(is_recomputed)
        if count is not None:
            with count:
                given.clone().requires_grad_().exp()
    return recomputed


def test_a_block_of_two_sizes_keeps_nothing_where_it_cannot_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of 100 bytes, then images of 400 or of 4,000. What is measured of the large ones holds one of them alone."""
    memory = MeasuredMemory(CPU)
    free = [0]
    monkeypatch.setattr(memory, "free_bytes", lambda: free[0])
    large, small = (TEXT, LARGE, LARGE, LARGE), (TEXT, SMALL, SMALL, SMALL)
    assert step(memory, *large) == [False, False, True, True]
    memory.after_step()  # the optimizer had no state yet
    assert step(memory, *large) == [False, False, True, True]
    memory.after_step()
    assert step(memory, *large) == [True, True, True, False]
    free[0] = 10_000
    assert step(memory, *small) == [True, False, True, True]
    memory.after_step()
    assert step(memory, *small) == [True, False, False, False]
    assert step(memory, *large) == [True, True, True, False]


def test_half_as_many_blocks_keep_theirs_each_time_that_memory_does_not_suffice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = MeasuredMemory(CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda: 10**9)
    for _ in range(2):
        step(memory, *[SMALL] * 5)
        memory.after_step()
    assert step(memory, *[SMALL] * 5) == [False] * 5
    for kept in (2, 1, 0):
        assert memory.recompute_more()
        assert step(memory, *[SMALL] * 5) == [True] * (5 - kept) + [False] * kept
    assert not memory.recompute_more()


@pytest.mark.parametrize(("answers", "found"), [([True, False], [True, False]), ([False], [False])])
def test_a_step_is_tried_again_only_where_its_room_has_more_to_recompute(
    answers: list[bool], found: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpointing = made_of(gradient_checkpointing_interval="auto")
    assert checkpointing is not None
    left = iter(answers)
    monkeypatch.setattr(checkpointing.room, "recompute_more", lambda: next(left))
    assert [checkpointing.recompute_more() for _ in answers] == found
    assert next(left, None) is None
