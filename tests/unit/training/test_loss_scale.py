"""Loss scaling against torch's own GradScaler, and what it survives."""

from __future__ import annotations

import torch
from torch import nn

from simpletuner.training.loss_scale import GROWTH_INTERVAL, LossScale


def test_the_scale_moves_as_torch_s_does() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    ours, theirs = LossScale.of("fp16"), torch.amp.GradScaler("cpu", growth_interval=GROWTH_INTERVAL)
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for step in range(GROWTH_INTERVAL + 20):
        is_finite = step not in (3, 4, 9)
        parameter.grad = torch.full((3,), 1.0 if is_finite else float("inf"))
        theirs.scale(torch.zeros(()))
        theirs.step(optimizer)
        theirs.update()
        ours.update(is_finite)
        assert ours.scale == theirs.get_scale(), step


def test_gradients_are_divided_by_the_scale() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    scale = LossScale.of("fp16")
    (parameter * torch.tensor([1.0, 3.0]) * scale.scale).sum().backward()
    scale.unscale([parameter])
    assert parameter.grad is not None
    assert parameter.grad.tolist() == [1.0, 3.0]


def test_other_formats_are_not_scaled() -> None:
    scale = LossScale.of("bf16")
    assert (scale.scale, scale.update(False), scale.scale) == (1.0, False, 1.0)


def test_at_the_smallest_scale_the_numbers_are_to_blame() -> None:
    scale = LossScale(True, scale=2.0)
    assert [scale.update(False) for _ in range(2)] == [True, False]
    restored = LossScale.of("fp16")
    restored.load_json(scale.to_json())
    assert restored == scale
