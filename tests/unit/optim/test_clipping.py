"""Clipping by hand numbers, and that unusable gradients are seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.optim.clipping import clip_by_norm, clip_by_value, gradient_norm


def with_grads(*grads: list[float], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(len(grad), dtype=dtype)) for grad in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.tensor(grad, dtype=dtype)
    return [*parameters, nn.Parameter(torch.zeros(2))]  # the last one has no gradient


def grads_of(parameters: list[nn.Parameter]) -> list[list[float]]:
    return [p.grad.tolist() for p in parameters if p.grad is not None]


def test_by_value_clamps_each_element_and_returns_the_largest() -> None:
    parameters = with_grads([0.5, -3.0], [0.25, 2.0])
    assert clip_by_value(parameters, 0.5).item() == 3.0
    assert grads_of(parameters) == [[0.5, -0.5], [0.25, 0.5]]


def test_by_norm_scales_all_together_and_returns_the_norm() -> None:
    parameters = with_grads([3.0, 0.0], [0.0, 4.0])
    assert clip_by_norm(parameters, 1.0).item() == pytest.approx(5.0)
    assert [value for grad in grads_of(parameters) for value in grad] == pytest.approx([0.6, 0, 0, 0.8], abs=1e-5)


def test_a_part_is_scaled_by_the_norm_of_all_parts() -> None:
    parameters = with_grads([3.0, 0.0])
    assert clip_by_norm(parameters, 1.0, torch.tensor(5.0)).item() == 5.0
    assert grads_of(parameters)[0] == pytest.approx([0.6, 0.0], abs=1e-5)


def test_small_gradients_stay_as_they_are() -> None:
    parameters = with_grads([0.3, 0.4])
    expected = grads_of(parameters)
    assert clip_by_norm(parameters, 1.0).item() == pytest.approx(0.5)
    assert clip_by_value(parameters, 1.0).item() == pytest.approx(0.4)
    assert gradient_norm(parameters).item() == pytest.approx(0.5)
    assert grads_of(parameters) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_unusable_gradients_are_seen(bad: float) -> None:
    assert not clip_by_value(with_grads([1.0], [bad, 2.0]), 0.5).isfinite()
    assert not clip_by_norm(with_grads([1.0], [bad, 2.0]), 0.5).isfinite()
    assert not gradient_norm(with_grads([1.0], [bad, 2.0])).isfinite()


def test_bfloat16_gradients_are_measured_in_float32() -> None:
    assert clip_by_value(with_grads([1.0, -2.0], dtype=torch.bfloat16), 0.5).dtype == torch.float32


def test_without_gradients_nothing_is_measured() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    assert clip_by_value(parameters, 1.0).item() == gradient_norm(parameters).item() == 0
    assert clip_by_norm(parameters, 1.0).item() == 0


def test_a_process_that_holds_nothing_of_a_parameter_clips_the_others() -> None:
    """Of a weight with one row, of which another process has all."""
    parameters = with_grads([], [0.5, -3.0])
    assert clip_by_value(parameters, 1.0).item() == 3.0
    assert grads_of(parameters) == [[], [0.5, -1.0]]
