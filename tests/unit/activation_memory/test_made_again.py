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
from simpletuner.activation_memory.gates import silu_gated
from simpletuner.activation_memory.tracing import Context, Trace


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


MASK, DOUBLE = torch.eye(4, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
# Of numbers between 0 and 1, (4, 4).
CHEAP_CALLS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + 1,
    "sub": lambda x: x - 1,
    "rsub": lambda x: torch.rsub(x, 1),
    "__rsub__": lambda x: 1 - x,
    "mul": lambda x: x * 2,
    "div": lambda x: x / 3,
    "neg": lambda x: -x,
    "pow": lambda x: x.pow(3),
    "square": torch.square,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "addcmul": lambda x: torch.addcmul(x, x, x),
    "lerp": lambda x: torch.lerp(x, x, 0.5),
    "clamp": lambda x: x.clamp(min=0.5),
    "clip": lambda x: x.clip(min=0.5),
    "where": lambda x: torch.where(MASK, x, 0.5),
    "masked_fill": lambda x: x.masked_fill(MASK, 0.5),
    "half": Tensor.half,
    "bfloat16": Tensor.bfloat16,
    "float": lambda x: x.half().float(),
    "double": Tensor.double,
    "to": lambda x: x.to(torch.float64),
    "type": lambda x: x.type(torch.float64),
    "type_as": lambda x: x.type_as(DOUBLE),
    "contiguous": lambda x: x.mT.contiguous(),
    "clone": torch.clone,
    "reshape": lambda x: x.mT.reshape(16),
    "flatten": lambda x: x.mT.flatten(),
    "cat": lambda x: torch.cat([x, x]),
    "concat": lambda x: torch.concat([x, x]),
    "stack": lambda x: torch.stack([x, x]),
    "repeat": lambda x: x.repeat(2, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(torch.tensor([2, 1, 1, 1]), 0),
    "pad": lambda x: F.pad(x, (1, 1)),
    "mean": lambda x: x.mean(0),
    "sum": lambda x: x.sum(0),
    "layer_norm": lambda x: F.layer_norm(x, (4,)),
    "rms_norm": lambda x: F.rms_norm(x, (4,)),
    "group_norm": lambda x: F.group_norm(x, 2),
    "silu": F.silu,
    "gelu": F.gelu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "softplus": F.softplus,
    "glu": F.glu,
    "recomputed": lambda x: recompute.recomputed(torch.exp, x),
    "silu_gated": silu_gated,
}


@pytest.mark.parametrize("name", CHEAP_CALLS)
def test_what_is_cheap_is_not_kept_and_made_again_as_it_was(name: str) -> None:
    call, kept = CHEAP_CALLS[name], set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    x = (torch.arange(16.0).reshape(4, 4) / 20 + 0.1).requires_grad_()
    expected = call(x.detach())
    factor = torch.full_like(expected, 3.0).requires_grad_()
    places = []

    def function(x: Tensor) -> Tensor:
        made = call(x.detach())  # some functions keep what they gave for a gradient of their own
        places.append(made.untyped_storage().data_ptr())
        return (made * factor).sum() + (x * x).sum()

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = traced(function, x)
    assert not kept.intersection(places)
    assert torch.equal(torch.autograd.grad(output, factor)[0], expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_what_is_made_again_has_the_autocast_of_the_first_time(dtype: torch.dtype | None) -> None:
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        first = Context.of("cpu")
    for other in (torch.bfloat16, torch.float16, None):
        with torch.autocast("cpu", dtype=other, enabled=other is not None), first():
            assert torch.is_autocast_enabled("cpu") == (dtype is not None)
            assert dtype is None or torch.get_autocast_dtype("cpu") == dtype
