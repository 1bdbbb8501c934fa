"""The average: its ramp by hand, its precision, its swap without a trace."""

from __future__ import annotations

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from simpletuner.errors import DataError
from simpletuner.optim.ema import EMA


def weights(value: float = 1.0, dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    return {
        "a": nn.Parameter(torch.full((2,), value, dtype=dtype)),
        "b": nn.Parameter(torch.full((3,), value, dtype=dtype)),
    }


def set_to(parameters: dict[str, nn.Parameter], value: float) -> None:
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.fill_(value)


def test_the_first_update_by_hand() -> None:
    parameters = weights(0.0)
    ema = EMA(parameters, decay=0.99)
    set_to(parameters, 1.0)
    ema.update(parameters, step=1)
    # decay (1 + 1) / (10 + 1) = 2 / 11, so 9 / 11 of the way.
    assert ema.state_dict()["a"].tolist() == pytest.approx([9 / 11] * 2)


def test_the_decay_rises_to_its_limit() -> None:
    ema = EMA(weights(), decay=0.9)
    assert [ema.decay_at(step) for step in (1, 10, 80, 81, 1000)] == pytest.approx([2 / 11, 0.55, 0.9, 0.9, 0.9])


def test_equal_to_diffusers_once_the_ramp_is_over() -> None:
    parameters = weights(0.0)
    ours = EMA(parameters, decay=0.05)  # below the ramp's first value in both
    theirs = EMAModel(parameters.values(), decay=0.05)
    theirs.optimization_step = 10
    for step in range(1, 8):
        set_to(parameters, float(step))
        ours.update(parameters, step)
        theirs.step(parameters.values())
    for average, expected in zip(ours.state_dict().values(), theirs.shadow_params, strict=True):
        torch.testing.assert_close(average, expected)


def test_the_average_of_bfloat16_weights_is_float32_and_still_moves() -> None:
    parameters = weights(1.0, torch.bfloat16)
    ema = EMA(parameters, decay=0.9999)
    set_to(parameters, 1.0078125)  # the next bfloat16
    for step in range(100_000, 100_010):
        ema.update(parameters, step)
    average = ema.state_dict()["a"]
    assert average.dtype == torch.float32
    assert average[0].item() == pytest.approx(1 + 0.0078125 * (1 - 0.9999**10), abs=1e-6)


def test_updates_keep_their_interval() -> None:
    parameters = weights(0.0)
    ema = EMA(parameters, decay=0.0, update_interval=4)
    set_to(parameters, 1.0)
    for step in (1, 2, 3):
        ema.update(parameters, step)
    assert not ema.state_dict()["a"].any()
    ema.update(parameters, 4)
    assert ema.state_dict()["a"].tolist() == [1.0, 1.0]


def test_the_ramp_counts_optimizer_steps_whatever_the_interval() -> None:
    parameters = weights(0.0)
    ema = EMA(parameters, decay=0.99, update_interval=10)
    set_to(parameters, 1.0)
    ema.update(parameters, 10)
    # decay (1 + 10) / (10 + 10) = 0.55, so 0.45 of the way.
    assert ema.state_dict()["a"].tolist() == pytest.approx([0.45] * 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swapping_in_leaves_no_trace(dtype: torch.dtype) -> None:
    parameters = weights(0.3, dtype)
    ema = EMA(parameters, decay=0.9)
    set_to(parameters, 0.7)
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    with ema.swapped_in(parameters):
        assert torch.equal(parameters["a"], torch.full((2,), 0.3, dtype=dtype))
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    with pytest.raises(RuntimeError, match="inside"), ema.swapped_in(parameters):
        raise RuntimeError("inside")
    assert all(torch.equal(parameters[name], before[name]) for name in before)
    assert torch.equal(ema.state_dict()["a"].to(dtype), torch.full((2,), 0.3, dtype=dtype))


def test_the_state_goes_through_a_checkpoint_bit_for_bit() -> None:
    parameters = weights(0.1)
    ema = EMA(parameters, decay=0.9)
    set_to(parameters, 0.123)
    ema.update(parameters, 1)
    saved = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    assert set(saved) == {"a", "b"}
    other = EMA(weights(5.0), decay=0.9)
    other.load_state_dict(saved | {"something else": torch.ones(1)})
    assert all(torch.equal(other.state_dict()[name], saved[name]) for name in saved)
    with pytest.raises(DataError, match="b"):
        other.load_state_dict({"a": saved["a"]})


def test_averages_of_another_shape_are_refused_with_their_number_and_names() -> None:
    ema = EMA(weights(), decay=0.9)
    with pytest.raises(DataError, match=r"no average for 1 parameters: b\n") as caught:
        ema.load_state_dict({"a": torch.zeros(2), "b": torch.zeros(4)})
    assert caught.value.problems[0].key == "use_ema"
    assert ema.state_dict()["a"].tolist() == [1, 1]  # nothing of it is taken


def test_inside_of_autocast_products_are_of_the_average_and_then_of_the_weights_again() -> None:
    """Autocast keeps 16-bit copies of weights until its context ends."""
    layer = nn.Linear(2, 1, bias=False)
    parameters = {"weight": layer.weight}
    set_to(parameters, 1.0)
    ema = EMA(parameters, decay=0.5)
    set_to(parameters, 3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        products = [layer(torch.ones(2)).item()]
        with ema.swapped_in(parameters):
            products.append(layer(torch.ones(2)).item())
        products.append(layer(torch.ones(2)).item())
    assert products == [6.0, 2.0, 6.0]
