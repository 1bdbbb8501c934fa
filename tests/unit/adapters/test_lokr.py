"""LoKr's structured forward against a Kronecker product that is built, and against LyCORIS' own default."""

from __future__ import annotations

import pytest
import torch
from lycoris.modules.lokr import LokrModule
from torch import nn

from simpletuner.activation_memory import recompute
from simpletuner.adapters.lokr import kron_linear, use_structured_forward


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_it_is_the_kronecker_product_on_hand_numbers() -> None:
    w1 = torch.tensor([[1.0, 2.0]])
    w2 = torch.tensor([[3.0, 4.0, 5.0]])
    # kron = [3, 4, 5, 6, 8, 10]
    x = torch.tensor([[1.0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1.0, 0], [1.0, 1, 1, 1, 1, 1]])
    assert kron_linear(x, w1, w2).flatten().tolist() == [3.0, 8.0, 36.0]


@pytest.mark.parametrize("shape", [(10,), (2, 5, 10), (1, 10)])
def test_any_leading_shape_gives_what_the_built_product_gives(shape: tuple[int, ...]) -> None:
    w1, w2, x = torch.randn(3, 2), torch.randn(4, 5), torch.randn(shape)
    torch.testing.assert_close(kron_linear(x, w1, w2), x @ torch.kron(w1, w2).T, rtol=1e-5, atol=1e-5)


CASES = {
    "full matrices": {"lora_dim": 10000, "factor": 4},
    "low-rank w2": {"lora_dim": 2, "alpha": 8, "factor": 4},
    "both low-rank": {"lora_dim": 1, "alpha": 3, "factor": 6, "decompose_both": True},
    "rank-stabilised": {"lora_dim": 2, "alpha": 4, "factor": 4, "rs_lora": True},
    "unbalanced": {"lora_dim": 10000, "factor": 4, "unbalanced_factorization": True},
    "multiplier": {"lora_dim": 2, "alpha": 8, "factor": 4, "multiplier": 0.5},
}


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_equal_lycoris_default(case: str) -> None:
    layer = nn.Linear(24, 36)
    plain = LokrModule("plain", layer, **CASES[case])
    ours = LokrModule("ours", layer, **CASES[case])
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours.load_state_dict(plain.state_dict())
    use_structured_forward(ours)

    results = []
    for module in (plain, ours):
        x = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(1), requires_grad=True)
        output = module(x)
        results.append([output, *torch.autograd.grad(output.square().mean(), [x, *module.parameters()])])
    assert not torch.allclose(results[0][0], layer(x))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_changes_that_a_merged_weight_would_swallow() -> None:
    layer = nn.Linear(64, 64, bias=False).to(torch.bfloat16)
    module = LokrModule("lokr", layer, lora_dim=10000, factor=8).to(torch.bfloat16)
    use_structured_forward(module)
    with torch.no_grad():
        module.lokr_w1.fill_(1.0)
        module.lokr_w2.fill_(1e-5)
    x = torch.ones(1, 64, dtype=torch.bfloat16)
    assert module.bypass_forward_diff(x).float().mean().item() == pytest.approx(64e-5, rel=1e-2)
    weight = layer.weight.detach()
    assert (weight + 1e-5 == weight).float().mean() > 0.5  # what merging does to most of them


def test_the_product_is_never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    module = LokrModule("lokr", nn.Linear(16, 16), lora_dim=10000, factor=4)
    use_structured_forward(module)

    def refuse(*args: object) -> None:
        raise AssertionError("built the Kronecker product")

    monkeypatch.setattr(torch, "kron", refuse)
    module(torch.randn(2, 16)).sum().backward()
    assert module.lokr_w2.grad is not None


@pytest.mark.parametrize("chain", [((4, 5),), ((2, 5), (4, 2))], ids=["one matrix", "low rank"])
def test_gradients_of_large_inputs_are_those_of_the_built_product(
    monkeypatch, chain: tuple[tuple[int, int], ...]
) -> None:
    """Large tensors go through a backward pass of their own."""
    monkeypatch.setattr(recompute, "LARGE", 0)
    w1, *w2_chain = (torch.randn(shape, requires_grad=True) for shape in ((3, 2), *chain))
    x = torch.randn(6, 10, requires_grad=True)
    weights = torch.randn(6, 12)
    w2 = w2_chain[0] if len(w2_chain) == 1 else w2_chain[1] @ w2_chain[0]
    expected = torch.autograd.grad((x @ torch.kron(w1, w2).T * weights).sum(), [x, w1, *w2_chain])
    found = torch.autograd.grad((kron_linear(x, w1, *w2_chain) * weights).sum(), [x, w1, *w2_chain])
    for theirs, ours in zip(expected, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_dropout_drops_in_training_alone() -> None:
    layer = nn.Linear(24, 36)
    module = LokrModule("lokr", layer, lora_dim=10000, factor=4, dropout=0.5)
    use_structured_forward(module)
    with torch.no_grad():
        module.lokr_w2.fill_(1.0)
    x = torch.ones(2, 24)

    def added(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return (module.bypass_forward_diff(x)).detach()

    module.train()
    assert (added(1) == 0).float().mean().item() == pytest.approx(0.5, abs=0.25)
    assert not torch.equal(added(1), added(2))
    module.eval()
    assert torch.equal(added(1), added(2))
    assert (added(1) != 0).all()
