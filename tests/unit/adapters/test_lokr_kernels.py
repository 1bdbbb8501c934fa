"""Kernels that take the place of LoKr's two products: chosen where they give the same numbers and are faster.

The real ones need a GPU; stand-ins show what is done with their numbers, their time and their failures.
"""

from __future__ import annotations

import subprocess

import pytest
import torch
from lycoris.modules.lokr import LokrModule
from torch import Tensor, nn

from simpletuner.adapters import lokr_kernels
from simpletuner.adapters.lokr import KronKernels, use_structured_forward
from simpletuner.adapters.lokr_kernels import choose_kernels, fused_kernels, name_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", 0)
    monkeypatch.setattr(lokr_kernels, "NUM_ROWS", 32)


def stand_in(calls: list[str], factor: float = 1.0, failure: Exception | None = None) -> KronKernels:
    """Builds the Kronecker product, and lets autograd differentiate it."""

    def forward(x: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
        calls.append("forward")
        if failure is not None:
            raise failure
        return x @ torch.kron(w1, w2).T * factor

    def backward(gradient: Tensor, x: Tensor, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        calls.append("backward")
        assert gradient.is_contiguous()
        assert gradient.shape == (len(x), 36)  # whatever the shape of the output, a row for each token
        inputs = [each.detach().requires_grad_() for each in (x, w1, w2)]
        with torch.enable_grad():
            return torch.autograd.grad(forward(*inputs), inputs, gradient)

    return KronKernels("stand-in", forward, backward)


def modules(**settings: int) -> list[LokrModule]:
    made = []
    for _ in range(2):
        module = LokrModule("lokr", nn.Linear(24, 36), **({"lora_dim": 10000, "factor": 4} | settings))
        use_structured_forward(module)
        nn.init.normal_(module.lokr_w2 if module.use_w2 else module.lokr_w2_a)
        made.append(module)
    return made


def timed(monkeypatch: pytest.MonkeyPatch, ours: float, theirs: float) -> None:
    monkeypatch.setattr(lokr_kernels, "median_seconds", lambda ways, device: [ours, theirs])


@pytest.mark.parametrize(("ours", "theirs", "is_won"), [(0.002, 0.001, True), (0.00105, 0.001, False)])
def test_the_faster_one_computes_and_is_named(
    monkeypatch: pytest.MonkeyPatch, ours: float, theirs: float, is_won: bool
) -> None:
    timed(monkeypatch, ours, theirs)
    both, calls = modules(), []
    [trial] = choose_kernels(both, stand_in(calls), CPU, torch.float32)  # one trial for two layers of a shape
    assert trial.is_won == is_won
    assert ("LyCORIS' kernels (" in str(trial)) == is_won
    calls.clear()
    x = torch.randn(2, 5, 24, requires_grad=True)
    both[1](x).square().sum().backward()
    both[1](x).sum().backward()  # whose gradient is one number in many places
    assert bool(calls) == is_won


def test_chosen_kernels_give_the_output_and_gradients_of_the_two_products(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 2.0, 1.0)
    module = modules()[0]
    x = torch.randn(2, 5, 24, requires_grad=True)

    def results() -> list[Tensor]:
        output = module(x)
        return [output, *torch.autograd.grad(output.square().sum(), [x, module.lokr_w1, module.lokr_w2])]

    expected = results()
    choose_kernels([module], stand_in([]), CPU, torch.float32)
    for found, right in zip(results(), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-4)


def test_wrong_numbers_are_never_fast_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 2.0, 1.0)
    both = modules()
    [trial] = choose_kernels(both, stand_in([], factor=1.01), CPU, torch.float32)
    assert "an error of" in str(trial)
    assert both[0].kron_kernels is None


NO_HEADERS = subprocess.CalledProcessError(1, ["gcc", "-I/usr/include/python3.11", "main.c"])


@pytest.mark.parametrize(
    "failure",
    [
        ImportError("no compiler\nfound"),
        RuntimeError("out of memory"),
        NO_HEADERS,
        FileNotFoundError("gcc"),
        KeyError("x"),
    ],
)
def test_kernels_that_fail_leave_the_two_products_and_say_why(failure: Exception) -> None:
    both = modules()
    [trial] = choose_kernels(both, stand_in([], failure=failure), CPU, torch.float32)
    assert str(trial).endswith(f"kernels failed: {str(failure).splitlines()[0]}")
    both[0](torch.randn(2, 24)).sum().backward()


def test_both_are_really_timed() -> None:
    [trial] = choose_kernels(modules(), stand_in([]), CPU, torch.bfloat16)
    assert trial.seconds is not None
    assert all(0 < seconds < 10 for seconds in trial.seconds)


def test_a_low_rank_factor_stays_with_the_products_and_a_processor_has_no_kernels() -> None:
    assert choose_kernels(modules(lora_dim=2), stand_in([]), CPU, torch.float32) == []
    assert fused_kernels(CPU) is None


@pytest.mark.parametrize("known", [True, False])
def test_what_an_earlier_start_chose_stays_and_is_not_timed_again(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    monkeypatch.setattr(lokr_kernels, "median_seconds", lambda ways, device: pytest.fail("timed"))
    [module, _], kernels = modules(), stand_in([])
    name = name_of((tuple(module.lokr_w1.shape), tuple(module.lokr_w2.shape)))
    [trial] = choose_kernels([module], kernels, CPU, torch.float32, {name: known})
    assert trial.is_won is known
    assert module.kron_kernels is (kernels if known else None)


@pytest.mark.parametrize("factor", ["use_w1", "use_w2"])
def test_a_module_with_a_factor_in_two_parts_computes_as_before(factor: str) -> None:
    decomposed, whole = modules()
    setattr(decomposed, factor, False)
    trials = choose_kernels([decomposed, whole], stand_in([]), CPU, torch.float32)
    assert len(trials) == 1
    decomposed, _ = modules()
    setattr(decomposed, factor, False)
    assert choose_kernels([decomposed], stand_in([]), CPU, torch.float32) == []
