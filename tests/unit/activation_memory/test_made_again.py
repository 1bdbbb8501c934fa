"""What a trace makes again, how often, and what of it stays: counted in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from simpletuner.activation_memory import recompute
from simpletuner.activation_memory.tracing import Trace


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(recompute, "LARGE", 0)


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with Trace("cpu"):
        return function(*inputs)


class Calls(TorchDispatchMode):
    """Names of torch's operations, and what the last silu gave."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.silu: StorageWeakRef | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.names.append(func.overloadpacket.__name__)
        if self.names[-1] == "silu":
            self.silu = StorageWeakRef(output.untyped_storage())
        return output


def test_a_tensor_that_several_places_ask_for_is_made_once_and_let_go_of() -> None:
    x, y = (torch.randn(4, 4, requires_grad=True) for _ in range(2))

    def function(x: Tensor, y: Tensor) -> Tensor:
        made = F.silu(x)
        return (made * y).sum() + (made * y.square()).sum()

    output = traced(function, x, y)
    with Calls() as calls:
        torch.autograd.grad(output, y, retain_graph=True)
    assert calls.names.count("silu") == 1
    assert "new_empty_strided" not in calls.names  # its source lies where it lay, and is not copied
    assert calls.silu is not None
    assert calls.silu.expired()


def test_what_one_place_needs_twice_is_made_once() -> None:
    x, y = (torch.randn(4, 4, requires_grad=True) for _ in range(2))

    def function(x: Tensor, y: Tensor) -> Tensor:
        made = F.silu(x)  # asked for by no saved place of its own
        return ((made * 2 + made * 3) * y).sum() + x.square().sum()

    output = traced(function, x, y)
    with Calls() as calls:
        [gradient] = torch.autograd.grad(output, y)
    assert calls.names.count("silu") == 1
    torch.testing.assert_close(gradient, 5 * F.silu(x))


def test_a_small_tensor_is_kept_where_its_source_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "LARGE", 64)
    x, y = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    for columns, made in ((1, 0), (4, 1)):
        output = traced(lambda x, y, columns=columns: (F.silu(x[:, :columns]) * y).sum(), x, y)
        with Calls() as calls:
            torch.autograd.grad(output, y)
        assert calls.names.count("silu") == made


def is_made_again(source: Tensor, change: Callable[[Tensor], Tensor]) -> bool:
    """Whether the backward pass makes what `change` makes of a source that nothing else keeps."""
    y = torch.randn(change(source).shape, requires_grad=True)
    output = traced(lambda source, y: (change(source) * y).sum(), source, y)
    with Calls() as calls:
        torch.autograd.grad(output, y)
    return bool({"silu", "_to_copy"} & set(calls.names))


def test_weights_are_there_anyway_and_other_sources_must_take_less_than_what_is_made_of_them() -> None:
    weight = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    assert is_made_again(weight, F.silu)
    assert not is_made_again(weight.data, F.silu)
    narrow = torch.randn(4, 8).bfloat16()
    assert is_made_again(narrow, Tensor.float)
    assert not is_made_again(narrow[:1], Tensor.float)  # all four rows would be kept for one


def test_what_was_made_without_autocast_is_made_again_without_it() -> None:
    """A product in bfloat16 would be 1."""
    x, weight = torch.full((1, 1), 1 + 2**-10), nn.Parameter(torch.ones(2, 1), requires_grad=False)
    y = torch.ones(1, 2, requires_grad=True)
    with Trace("cpu", makes_products=True):
        output = (F.linear(x, weight) * y).sum()
    with torch.autocast("cpu", dtype=torch.bfloat16), Calls() as calls:
        [gradient] = torch.autograd.grad(output, y)
    assert {"mm", "addmm", "linear"} & set(calls.names)
    assert gradient.tolist() == [[1 + 2**-10] * 2]
