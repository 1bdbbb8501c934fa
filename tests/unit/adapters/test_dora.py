"""DoRA of linear layers computes what PEFT's computes, and keeps less for the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from simpletuner.activation_memory import recompute
from simpletuner.adapters.dora import _magnitude_scale, use_own_dora

RANK, TOKENS, WIDTH, OUT = 3, 7, 10, 12


def dora(bias: bool, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(PEFT's layer, the same one by our form), after some training."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, OUT, bias=bias)).requires_grad_(False)
    config = LoraConfig(r=RANK, lora_alpha=5, lora_dropout=dropout, use_dora=True, target_modules=["0"])
    inject_adapter_in_model(config, model)
    model.to(dtype)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    layer: Any = model[0]
    ours = copy.deepcopy(layer)
    use_own_dora(ours)
    assert type(ours.lora_variant["default"]) is not type(layer.lora_variant["default"]) is DoraLinearVariant
    return layer.train(), ours.train()


def results(layer: Any, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    trained = [each for each in layer.parameters() if each.requires_grad]
    assert len(trained) == 3
    output = layer(x)
    return [output, *torch.autograd.grad(output.square().sum(), [x, *trained])]


@pytest.mark.parametrize("large", [0, 1 << 20])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients_are_those_of_peft(
    bias: bool, dropout: float, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "LARGE", large)
    theirs, ours = dora(bias, dropout)
    x = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    for actual, expected in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_is_kept_but_inputs_one_answer_and_what_has_the_rank(
    dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recompute, "LARGE", 0)
    x = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    sizes = []
    for layer in dora(bias=True, dropout=dropout):
        found: dict[int, Tensor] = {each.untyped_storage().data_ptr(): each for each in layer.parameters()}
        weights = set(found)

        def keep(tensor: Tensor, found: dict[int, Tensor] = found) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x)
        sizes.append(sum(each.numel() for key, each in found.items() if key not in weights))
    theirs, ours = sizes
    # For each row its length, and by what it is multiplied. Dropout keeps its mask, and what it leaves.
    masked = WIDTH if dropout else 0
    assert ours == 2 * TOKENS * (WIDTH + masked + RANK + OUT) + 2 * OUT
    assert theirs > 1.5 * ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_one_answers_as_its_base_does_bit_by_bit(dtype: torch.dtype) -> None:
    _, ours = dora(bias=True, dtype=dtype)
    x = torch.randn(2, TOKENS, WIDTH, dtype=dtype)
    with torch.no_grad():
        nn.init.zeros_(ours.lora_B["default"].weight)
        weight = ours.get_base_layer().weight
        length = ours.lora_magnitude_vector["default"].get_weight_norm(weight, torch.zeros_like(weight), 1.0)
        ours.lora_magnitude_vector["default"].weight.copy_(length)
        assert torch.equal(ours(x), ours.get_base_layer()(x))


def test_a_compiler_can_follow_it_as_a_whole() -> None:
    """PEFT's own form asks a weight for the name of its module, which no compiler follows."""
    _, ours = dora(bias=True)
    x = torch.randn(2, TOKENS, WIDTH, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(x), ours(x))


def test_lengths_under_autocast_are_those_of_float32() -> None:
    _, ours = dora(bias=True)
    expected = _magnitude_scale(ours, "default")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(_magnitude_scale(ours, "default"), expected)
    weight, down, up = (each.weight for each in (ours.base_layer, ours.lora_A["default"], ours.lora_B["default"]))
    length = (weight + 5 / RANK * up @ down).norm(dim=1)
    torch.testing.assert_close(expected, ours.lora_magnitude_vector["default"].weight / length, rtol=1e-5, atol=0)


def test_outside_of_training_dropout_costs_no_second_product_of_the_base() -> None:
    _, ours = dora(bias=True, dropout=0.5)
    calls: list[None] = []
    ours.get_base_layer().register_forward_hook(lambda *about: calls.append(None))
    ours.eval()(torch.randn(TOKENS, WIDTH))
    assert len(calls) == 1
