"""Weights as copies or as parts, in real processes, against the numbers of one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.distributed.placement import Replicated, Sharded
from simpletuner.distributed.process_group import SINGLE_PROCESS
from simpletuner.distributed.sharding import shard_denoiser, spread_parameters
from simpletuner.errors import ConfigError
from simpletuner.optim.clipping import gradient_norm
from tests.processes import in_processes


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(12.0).reshape(4, 3))

    def forward(self, x):
        return x @ self.weight.T


class Net(nn.Module):
    """The gradient of its sum is, for each row of the weight, the sum of the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        return self.block(x) * self.scale


def spread(process_group, **options) -> tuple[Net, Sharded]:
    net = Net()
    shard_denoiser(net, ("Block",), process_group, torch.device("cpu"), whole=set(), **options)
    return net, Sharded(parts := dict(spread_parameters(net)), process_group, parts.keys())


def test_frozen_weights_are_spread_too_and_come_back_whole():
    """The scale alone trains; the block's weight has no gradient, no optimizer's place, and is whole when saved."""

    def work(process_group):
        net = Net()
        net.block.weight.requires_grad_(False)
        shard_denoiser(net, ("Block",), process_group, torch.device("cpu"), whole=set())
        parts = Sharded(dict(spread_parameters(net)), process_group, {"scale"})
        net(torch.ones(1, 3)).sum().backward()
        parts.collect_gradients()
        wholes = parts.whole({**parts.parameters, **parts.frozen})
        return {
            "trained": list(parts.parameters),
            "shapes": parts.shapes(),
            "held": list(parts.frozen["block.weight"].shape),
            "whole": {name: tensor.tolist() for name, tensor in wholes.items()},
        }

    main, other = in_processes(2, work)
    assert main["trained"] == other["trained"] == ["scale"]
    assert main["shapes"] == {"scale": [4]}
    assert main["held"] == other["held"] == [2, 3]
    assert main["whole"] == {"scale": [1.0] * 4, "block.weight": torch.arange(12.0).reshape(4, 3).tolist()}
    assert other["whole"] == {}


@pytest.mark.parametrize(("size", "shard_size"), [(2, None), (6, 2), (4, None)])
def test_parts_have_the_summed_gradient_and_its_true_norm(size, shard_size):
    """Process r sees the input r + 1: the gradient of each row of the weight is the sum of all of them."""

    def work(process_group):
        net, parts = spread(process_group, shard_size=shard_size)
        net(torch.full((1, 3), float(process_group.rank + 1))).sum().backward()
        parts.collect_gradients()
        own = gradient_norm(list(parts.parameters.values()))
        wholes = parts.whole({name: parameter.grad for name, parameter in parts.parameters.items()})
        largest = max(float(parameter.grad.abs().max()) for parameter in parts.parameters.values())
        return {
            "norm": float(parts.norm_of_all(own)),
            "largest": float(parts.largest_of_all(torch.tensor(largest))),
            "gradient": {name: whole.tolist() for name, whole in wholes.items()},
            "rows": parts.parameters["block.weight"].shape[0],
            "shapes": parts.shapes(),
            "copies": parts.num_copies,
        }

    answers = in_processes(size, work)
    total = sum(range(1, size + 1))
    # The scale's gradient is the output: rows 0 + 1 + 2, 3 + 4 + 5, 12 + 9, 9 + 10 + 11 times the input.
    scale = [3.0 * total, 12.0 * total, 21.0 * total, 30.0 * total]
    norm = (12 * total**2 + sum(value**2 for value in scale)) ** 0.5
    assert [answer["norm"] for answer in answers] == pytest.approx([norm] * size)
    assert [answer["largest"] for answer in answers] == [30.0 * total] * size
    assert answers[0]["gradient"] == {"block.weight": [[float(total)] * 3] * 4, "scale": scale}
    assert all(answer["gradient"] == {} for answer in answers[1:])
    assert answers[0]["rows"] == 4 // (shard_size or size)
    assert answers[0]["shapes"] == {"block.weight": [4, 3], "scale": [4]}
    assert answers[0]["copies"] == (3 if shard_size else 1)


def test_parts_and_wholes_are_each_other_s_inverse_and_a_counter_stays_as_it_is():
    def work(process_group):
        _, parts = spread(process_group)
        whole = {
            "block.weight": torch.arange(12.0).reshape(4, 3) * 2,
            "block.weight//exp_avg": torch.arange(12.0).reshape(4, 3) * 3,
            "scale//step": torch.tensor(7.0),
        }
        own = parts.part(whole)
        back = parts.whole(own)
        return {
            "own": {name: tensor.tolist() for name, tensor in own.items()},
            "back": {name: torch.equal(tensor, whole[name]) for name, tensor in back.items()},
        }

    main, other = in_processes(2, work)
    assert main["own"]["block.weight"] == [[0, 2, 4], [6, 8, 10]]
    assert other["own"]["block.weight"] == [[12, 14, 16], [18, 20, 22]]
    assert other["own"]["block.weight//exp_avg"] == [[18, 21, 24], [27, 30, 33]]
    assert main["own"]["scale//step"] == other["own"]["scale//step"] == 7
    assert main["back"] == {"block.weight": True, "block.weight//exp_avg": True, "scale//step": True}
    assert other["back"] == {"scale//step": True}


def test_the_optimizer_moves_the_denoiser_through_its_parts():
    def work(process_group):
        net, parts = spread(process_group)
        optimizer = torch.optim.SGD(list(parts.parameters.values()), lr=0.5)
        net(torch.full((1, 3), float(process_group.rank + 1))).sum().backward()
        parts.collect_gradients()
        parts.step(optimizer)
        whole = net.block.weight.full_tensor().tolist()
        return [whole, net.block.weight.grad is None]

    for whole, is_collected in in_processes(2, work):
        assert whole == [[value - 1.5 for value in row] for row in torch.arange(12.0).reshape(4, 3).tolist()]
        assert is_collected


def test_the_largest_gradient_is_nan_where_one_process_has_one():
    def work(process_group):
        parts = spread(process_group)[1]
        return [
            float(parts.largest_of_all(torch.tensor(float(process_group.rank)))),
            bool(parts.largest_of_all(torch.tensor([1.0, torch.nan][process_group.rank])).isnan()),
            bool(parts.norm_of_all(torch.tensor([torch.nan, 1.0][process_group.rank])).isnan()),
        ]

    assert in_processes(2, work) == [[1, True, True]] * 2


def test_processes_that_cannot_be_divided_are_refused():
    def work(process_group):
        with pytest.raises(ConfigError, match="2 does not divide the 3 processes"):
            spread(process_group, shard_size=2)
        return True

    assert in_processes(3, work) == [True] * 3


def test_copies_sum_their_gradients_and_are_whole():
    parameter = nn.Parameter(torch.zeros(2, 3))
    alone = Replicated({"a": parameter}, SINGLE_PROCESS)
    assert alone.shapes() == {"a": [2, 3]}
    assert not alone.is_spread
    assert float(alone.norm_of_all(torch.tensor(3.0))) == float(alone.largest_of_all(torch.tensor(3.0))) == 3
    assert alone.whole({"a": parameter})["a"] is alone.part({"a": parameter})["a"] is parameter

    def work(process_group):
        weight = nn.Parameter(torch.zeros(2))
        copies = Replicated({"a": weight}, process_group)
        copies.backward((weight * (process_group.rank + 1)).sum(), is_last=False)
        copies.backward((weight * 10).sum(), is_last=True)
        copies.collect_gradients()
        copies.check("here")
        with torch.no_grad():
            weight += process_group.rank
        with pytest.raises(RuntimeError, match="after step 5"):
            copies.check("after step 5")
        return weight.grad.tolist()

    assert in_processes(2, work) == [[23, 23]] * 2
