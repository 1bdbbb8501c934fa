"""AdamW for bfloat16: plain AdamW in float32, unbiased rounding in bfloat16, the same after a resume."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.optim import adamw_bf16
from simpletuner.optim.adamw_bf16 import AdamWBF16, stochastic_bf16
from simpletuner.optim.state import load_optimizer_tensors, optimizer_tensors


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, generator=generator(i)).to(dtype)) for i, shape in enumerate(shapes)]


def set_grads(params: list[nn.Parameter], step: int) -> None:
    for i, param in enumerate(params):
        param.grad = torch.randn(param.shape, generator=generator(100 * step + i)).to(param.dtype)


def test_float32_weights_get_torchs_adamw() -> None:
    shapes = [(4, 5), (7,), (2, 3, 2)]
    ours, theirs = weights(torch.float32, *shapes), weights(torch.float32, *shapes)
    settings = {"lr": 3e-3, "betas": (0.9, 0.99), "weight_decay": 0.05, "eps": 1e-7}
    optimizer = AdamWBF16(ours, **settings)
    reference = torch.optim.AdamW(theirs, foreach=False, fused=False, **settings)
    for step in range(20):
        set_grads(ours, step)
        set_grads(theirs, step)
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_the_first_step_moves_by_the_learning_rate_against_the_gradients_sign() -> None:
    param = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float32))
    param.grad = torch.tensor([0.5, -3.0])
    AdamWBF16([param], lr=0.1, weight_decay=0.0).step()
    # m / (1 - b1) = g and v / (1 - b2) = g^2, so the step is lr * sign(g).
    torch.testing.assert_close(param.detach(), torch.tensor([0.9, -1.9]))


def test_rounding_keeps_exact_values_and_is_right_on_average() -> None:
    exact = torch.tensor([0.0, 1.0, -1.5, 2.0**-20, float("inf")])[:4]
    assert torch.equal(stochastic_bf16(exact.clone(), generator()).float(), exact)

    # Between 1 and 1 + 2^-7 there is no bfloat16: a quarter of the way up must round up in a quarter of the cases.
    value = 1 + 2**-9
    rounded = stochastic_bf16(torch.full((40_000,), value), generator()).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(value, abs=5e-5)
    negative = stochastic_bf16(torch.full((40_000,), -value), generator()).float()
    assert negative.mean().item() == pytest.approx(-value, abs=5e-5)


def test_numbers_that_are_not_finite_stay_so() -> None:
    of_processors, of_gpus, negative = 0x7FC00000, 0x7FFFFFFF, -1  # bits of a NaN
    for bits in (of_processors, of_gpus, negative):
        values = torch.full((1000,), bits, dtype=torch.int32).view(torch.float32)
        assert stochastic_bf16(values, generator()).isnan().all()
    infinite = torch.tensor([float("inf"), float("-inf")])
    assert torch.equal(stochastic_bf16(infinite.clone(), generator()).float(), infinite)


def test_updates_too_small_for_bfloat16_add_up() -> None:
    lr, steps = 1e-4, 400
    ours = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    nearest = nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    optimizer = AdamWBF16([ours], lr=lr, weight_decay=0.0)
    plain = torch.optim.AdamW([nearest], lr=lr, weight_decay=0.0)
    for _ in range(steps):
        for param, which in ((ours, optimizer), (nearest, plain)):
            param.grad = torch.ones_like(param)
            which.step()
    # A constant gradient moves each weight by lr per step: 1 - 400 * 1e-4 = 0.96; 1e-4 is below half a bfloat16 step.
    assert ours.float().mean().item() == pytest.approx(0.96, abs=2e-3)
    assert (nearest == 1).all()


def test_the_second_moment_follows_a_falling_gradient() -> None:
    param = nn.Parameter(torch.zeros(1000, dtype=torch.bfloat16))
    optimizer = AdamWBF16([param], lr=1e-4)
    for step in range(300):
        param.grad = torch.full_like(param, 1.0 if step == 0 else 0.0)
        optimizer.step()
    # 0.001 * 0.999^299 = 7.4e-4; rounded to nearest it would have stayed at 0.001.
    assert optimizer.state[param]["exp_avg_sq"].float().mean().item() == pytest.approx(7.4e-4, rel=0.02)


def run(steps: range, params: list[nn.Parameter], optimizer: AdamWBF16) -> None:
    for step in steps:
        set_grads(params, step)
        torch.rand(step + 1)  # whatever else draws must not matter
        optimizer.step()


def test_a_resumed_run_rounds_the_same_way() -> None:
    whole = weights(torch.bfloat16, (8, 8), (16,))
    optimizer = AdamWBF16(whole, lr=1e-3, seed=5)
    run(range(4), whole, optimizer)

    halves = weights(torch.bfloat16, (8, 8), (16,))
    first = AdamWBF16(halves, lr=1e-3, seed=5)
    run(range(2), halves, first)
    second = AdamWBF16(halves, lr=1e-3, seed=5)
    names = {str(index): param for index, param in enumerate(halves)}
    load_optimizer_tensors(second, names, *optimizer_tensors(first, names))
    run(range(2, 4), halves, second)
    assert all(torch.equal(a, b) for a, b in zip(whole, halves, strict=True))


def test_another_seed_rounds_another_way() -> None:
    results = []
    for seed in (1, 2):
        params = weights(torch.bfloat16, (64, 64))
        run(range(2), params, AdamWBF16(params, lr=1e-3, seed=seed))
        results.append(params[0])
    assert not torch.equal(*results)


def test_chunks_change_only_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for limit in (adamw_bf16.CHUNK_ELEMENTS, 10):
        monkeypatch.setattr(adamw_bf16, "CHUNK_ELEMENTS", limit)
        params = weights(torch.bfloat16, (4, 2), (30,), (5,))
        run(range(3), params, AdamWBF16(params, lr=1e-3))
        results.append(params)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-3)


def test_mixed_dtypes_and_missing_gradients_are_served() -> None:
    params = weights(torch.bfloat16, (3,)) + weights(torch.float32, (3,), (2,))
    before = [param.detach().clone() for param in params]
    set_grads(params, 0)
    params[2].grad = None
    AdamWBF16(params, lr=0.1).step()
    changed = [not torch.equal(a, b) for a, b in zip(params, before, strict=True)]
    assert changed == [True, True, False]


def test_weights_of_other_chunks_are_rounded_by_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw_bf16, "CHUNK_ELEMENTS", 500)
    params = [nn.Parameter(torch.ones(500, dtype=torch.bfloat16)) for _ in range(2)]
    for param in params:
        param.grad = torch.ones_like(param)
    AdamWBF16(params, lr=2**-9, weight_decay=0.0).step()
    # Half of a step of bfloat16 below 1: each weight goes there or stays, half of them by chance.
    first, second = ((param < 1).float() for param in params)
    assert abs(first.mean() - 0.5) < 0.1
    assert abs((first == second).float().mean() - 0.5) < 0.1
