"""A traced block keeps what it must, and gives the bits of the plain one: values and gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from simpletuner.activation_memory import recompute
from simpletuner.activation_memory.modules import reduce_activation_memory, set_activation_memory
from simpletuner.activation_memory.tracing import Context, Trace
from simpletuner.adapters.lokr import kron_linear
from simpletuner.precision.linear import QuantizedLinear
from simpletuner.precision.quantize import get_format
from tests.unit.activation_memory.blocks import HEADS, TOKENS, WIDTH, Block, inputs_of, kept_bytes, results


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(recompute, "LARGE", 0)


def again(function: Any, *inputs: Any) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False)


def counted(function: Any, *inputs: Any) -> Any:
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        return function(*inputs)


def moved(function: Any, *inputs: Any) -> Any:
    """As `save_on_cpu` does on an accelerator, without the strides; on the CPU itself it moves nothing."""
    with saved_tensors_hooks(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), lambda tensor: tensor):
        return function(*inputs)


def by_autocast(function: Any, *inputs: Any) -> Any:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return function(*inputs)


@pytest.mark.parametrize("makes_products", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wraps", [None, again, counted, moved, by_autocast])
def test_values_and_gradients_are_those_of_the_plain_block_bit_by_bit(
    wraps: Any, dtype: torch.dtype, makes_products: bool
) -> None:
    block, inputs = Block().to(dtype), inputs_of(dtype)
    expected = results(block, inputs, wraps)
    plain = block.forward

    def traced(*inputs: Any) -> Tensor:
        with Trace("cpu", makes_products):
            return plain(*inputs)

    block.forward = traced  # type: ignore[method-assign]
    for actual, wanted in zip(results(block, inputs, wraps), expected, strict=True):
        assert torch.equal(actual, wanted)


@contextmanager
def plain_bytes(block: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[tuple[int, int]]:
    plain = kept_bytes(lambda: block(*inputs), block)
    reduce_activation_memory(block, ("Block",))
    yield plain, kept_bytes(lambda: block(*inputs), block)


@pytest.mark.parametrize("adapts_mlp", [False, True])
def test_a_block_keeps_residuals_attention_and_the_projection_into_the_mlp_alone(adapts_mlp: bool) -> None:
    inputs, block = inputs_of(), Block(adapts_mlp)
    tokens = inputs[0].numel() * 4
    joint = (TOKENS + 2) * 2 * WIDTH * 4
    text = inputs[4].nbytes
    # Input and middle, queries and keys before their norms, the projection; values and what attention made, joined
    # with the text; the text; per token and head a sum of attention, per token two numbers of each of two norms.
    must = (1 + 1 + 2 + 4) * tokens + 2 * joint + text + joint // WIDTH * HEADS + 4 * tokens // WIDTH
    small = sum(each.nbytes for each in inputs[1:4]) + tokens // WIDTH * 2 * 2 * (2 + 6 if adapts_mlp else 6)
    with plain_bytes(block, inputs) as (plain, traced):
        assert must <= traced <= must + small
        assert traced < 0.75 * plain


def test_products_are_computed_again_only_where_that_is_asked_for_and_they_widen_their_input() -> None:
    inputs, block = inputs_of(), Block(adapts_mlp=False)
    found = {}
    for makes_products in (False, True):

        def run(makes_products: bool = makes_products) -> Tensor:
            with Trace("cpu", makes_products):
                return block(*inputs)

        found[makes_products] = kept_bytes(run, block)
    assert found[False] - found[True] == 4 * inputs[0].numel() * 4


def as_lokr(layer: nn.Linear) -> nn.Module:
    """Two factors beside a frozen layer, as `adapters/lokr.py` computes them."""

    class Lokr(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base, self.w1 = layer, nn.Parameter(torch.randn(4, 2))
            self.w2 = nn.Parameter(torch.randn(layer.out_features // 4, layer.in_features // 2))

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x) + kron_linear(x, self.w1, self.w2)

    return Lokr()


def packed(layer: nn.Linear) -> nn.Module:
    return QuantizedLinear(layer, get_format("int8-quanto"))


@pytest.mark.parametrize("change", [packed, as_lokr, lambda layer: as_lokr(packed(layer))])
def test_packed_weights_and_factors_are_multiplied_again_too(change: Callable[[Any], nn.Module]) -> None:
    block, inputs = Block(adapts_mlp=False), inputs_of()
    block.up = change(block.up)
    expected = results(block, inputs)
    reduce_activation_memory(block, ("Block",))
    found = {}
    for is_on in (False, True):
        set_activation_memory(block, "lowest" if is_on else "low")
        found[is_on] = kept_bytes(lambda: block(*inputs), block)
        for actual, wanted in zip(results(block, inputs), expected, strict=True):
            torch.testing.assert_close(actual, wanted)
    assert found[False] - found[True] >= 4 * inputs[0].numel() * 4


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    with Trace("cpu"):
        return function(*inputs)


def written_after_it_was_used(x: Tensor, y: Tensor) -> Tensor:
    scaled = F.silu(x)
    used = scaled * y  # keeps what silu made
    with torch.no_grad():
        x.mul_(2)
    return used.sum() + F.silu(y).sum()


def written_itself(x: Tensor, y: Tensor) -> Tensor:
    made = F.silu(x)
    made.add_(1)
    return (made * y).sum()


def written_by_parts(x: Tensor, y: Tensor) -> Tensor:
    made = F.silu(x)
    made[:, 0] = 0.5
    return (made * y).sum()


def written_into(x: Tensor, y: Tensor) -> Tensor:
    made = (x * 2).detach()
    torch.mul(x.detach(), 3, out=made)
    return (made * y).sum() + x.sum()


def views_of_one(x: Tensor, y: Tensor) -> Tensor:
    made = torch.cat([x, y], dim=-1) * 1.5
    first, second = made.chunk(2, dim=-1)
    return (first.mT @ second).square().sum()


def complex_numbers(x: Tensor, y: Tensor) -> Tensor:
    turned = torch.view_as_complex(F.silu(x).unflatten(-1, (-1, 2)).contiguous()) * torch.polar(y, y)[..., :2]
    return (torch.view_as_real(turned).flatten(-2) * x).sum() + turned.abs().square().sum()


def lists_and_masks(x: Tensor, y: Tensor) -> Tensor:
    chosen = torch.where(x > 0, F.silu(x), y)
    return (torch.stack([chosen, chosen.repeat_interleave(1, 0)]).square() * y).sum()


def freed_places(x: Tensor, y: Tensor) -> Tensor:
    total = x.sum()
    for number in range(8):
        made = F.silu(x * number)
        (made * y).sum()
        del made
        total = total + (_Opaque.apply(x, number) * y).sum()
    return total


def part_of_a_kept_one(x: Tensor, y: Tensor) -> Tensor:
    """The first product keeps what silu made, which is as large as its source; the second is made of a part of it."""
    made = F.silu(x.detach())
    part = F.silu(made[:, 1:3])
    return (made * y).sum() + (part * y[:, :2]).sum() + x.sum()


def views_of_a_transposed_one(x: Tensor, y: Tensor) -> Tensor:
    made = F.silu(x.mT) * 1.5
    first, second = made.chunk(2, dim=-1)
    return (first * second * y[:, :2]).square().sum() + (x * x).sum()


def made_of_an_expanded_one(x: Tensor, y: Tensor) -> Tensor:
    row = (x[:1] * x[:1]).expand(4, 4)
    return (F.silu(row) * y).sum() + (row * y).square().sum()


def made_of_an_expanded_input(x: Tensor, y: Tensor) -> Tensor:
    """A hook that moves it gives all rows, and no storage with a stride of 0 can be written."""
    return (F.silu(x[:1].expand(4, 4)) * y).sum() + (x * x).sum()


class _Opaque(torch.autograd.Function):
    """Not seen by a trace, so its output may lie where a noted tensor lay."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, number: int) -> Tensor:
        return x + number

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


HARD = (
    *(written_itself, written_by_parts, written_into, views_of_one, complex_numbers, lists_and_masks, freed_places),
    *(part_of_a_kept_one, views_of_a_transposed_one, made_of_an_expanded_one, made_of_an_expanded_input),
)


@pytest.mark.parametrize("wraps", [None, moved])
@pytest.mark.parametrize("function", HARD)
def test_what_looks_like_a_noted_tensor_and_is_none_is_kept(function: Callable[..., Tensor], wraps: Any) -> None:
    found = []
    for run in (lambda *each: function(*each), lambda *each: traced(function, *each)):
        run = partial(wraps, run) if wraps else run
        torch.manual_seed(1)
        x, y = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
        output = run(x * 1, y * 1)
        found.append([output, *torch.autograd.grad(output, [x, y], allow_unused=True)])
    for actual, wanted in zip(found[1], found[0], strict=True):
        assert wanted is not None
        assert torch.equal(actual, wanted)


def test_a_tensor_whose_source_was_written_meanwhile_is_kept() -> None:
    source, y = torch.randn(4, 4), torch.randn(4, 4, requires_grad=True)
    expected = F.silu(source).clone()
    output = traced(written_after_it_was_used, source, y)
    [gradient] = torch.autograd.grad(output, y)
    sigmoid = torch.sigmoid(y)
    torch.testing.assert_close(gradient, expected + sigmoid * (1 + y * (1 - sigmoid)))


def test_a_source_that_takes_less_and_was_written_meanwhile_makes_nothing_again() -> None:
    """In 16 bits it would be kept in place of what was made of it, but for its other values."""

    def widened(x: Tensor, y: Tensor) -> Tensor:
        used = F.silu(x.float()) * y
        with torch.no_grad():
            x.mul_(2)
        return used.sum() + F.silu(y).sum()

    source, y = torch.randn(4, 4).bfloat16(), torch.randn(4, 4, requires_grad=True)
    sigmoid = torch.sigmoid(y)
    expected = F.silu(source.float()) + sigmoid * (1 + y * (1 - sigmoid))
    [gradient] = torch.autograd.grad(traced(widened, source, y), y)
    torch.testing.assert_close(gradient, expected)


def test_the_backward_pass_may_run_twice() -> None:
    block, inputs = Block(), inputs_of()
    reduce_activation_memory(block, ("Block",))
    output = block(*inputs).square().sum()
    first, second = (torch.autograd.grad(output, inputs[0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_what_is_made_again_is_made_once_for_all_its_places_and_freed_when_the_last_has_asked() -> None:
    made: list[StorageWeakRef] = []

    class SiluOutputs(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            if function is torch.ops.aten.silu.default:
                made.append(StorageWeakRef(output.untyped_storage()))
            return output

    def used_twice(x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        hidden = F.silu(x)
        return (hidden * a + hidden * b + x * c).sum()

    x, *weights = (torch.randn(4, 4, requires_grad=index > 0) for index in range(4))
    output = traced(used_twice, x, *weights)
    with SiluOutputs():
        torch.autograd.grad(output, weights, retain_graph=True)
    assert len(made) == 1
    assert made[0].expired()


def test_a_compiler_gets_the_plain_block() -> None:
    block, inputs = Block(), inputs_of()
    reduce_activation_memory(block, ("Block",))
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), block(*inputs))


def test_small_inputs_and_passes_without_gradients_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    block, inputs = Block(), inputs_of()
    reduce_activation_memory(block, ("Block",))
    entered: list[Any] = []
    enter = Trace.__enter__
    monkeypatch.setattr(Trace, "__enter__", lambda self: entered.append(self) or enter(self))
    with torch.no_grad():
        block(*inputs)
    monkeypatch.setattr(recompute, "LARGE", max(each.nbytes for each in inputs) + 1)
    block(*inputs)
    assert not entered
    monkeypatch.setattr(recompute, "LARGE", max(each.nbytes for each in inputs))
    block(*inputs)
    assert len(entered) == 1


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[Trace]:
    """Every trace that begins."""
    found: list[Trace] = []
    enter = Trace.__enter__
    monkeypatch.setattr(Trace, "__enter__", lambda self: found.append(self) or enter(self))
    return found


def test_the_level_decides_whether_a_block_is_traced_and_its_products_are_made_again(entered: list[Trace]) -> None:
    block, inputs = Block(), inputs_of()
    reduce_activation_memory(block, ("Block",))
    block(*inputs)
    for level in ("low", "lowest", "high"):
        set_activation_memory(block, level)
        block(*inputs)
    assert [trace.makes_products for trace in entered] == [False, False, True]


def test_a_block_that_is_called_by_names_is_traced_too(entered: list[Trace]) -> None:
    block = Block()
    reduce_activation_memory(block, ("Block",))
    block(**dict(zip(("x", "shift", "cos", "sin", "text"), inputs_of(), strict=True)))
    assert len(entered) == 1


def test_a_block_inside_of_a_block_belongs_to_the_outer_trace(entered: list[Trace]) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Block()

        def forward(self, *inputs: Tensor) -> Tensor:
            return self.inner(*inputs) * 2

    outer = Outer()
    reduce_activation_memory(outer, ("Outer", "Block"))
    outer(*inputs_of())
    assert len(entered) == 1


def test_nothing_of_a_block_lives_longer_than_its_graph() -> None:
    block, inputs = Block(), inputs_of()
    reduce_activation_memory(block, ("Block",))
    output = block(*inputs)
    alive = torch.multiprocessing.reductions.StorageWeakRef(output.untyped_storage())
    output.sum().backward()
    del output
    assert alive.expired()


def test_nothing_of_a_block_that_checkpointing_leaves_off_outlives_the_step() -> None:
    """It recomputes a block up to the last tensor that is asked for, and ends it there by an exception."""
    weight = torch.randn(8, 8, requires_grad=True)
    made = []

    def block(x: Tensor) -> Tensor:
        with Trace("cpu"):
            hidden = F.silu(x @ weight)
            hidden = hidden * torch.sigmoid(hidden)
            probabilities = F.softmax(hidden, -1)
            made.extend(StorageWeakRef(each.untyped_storage()) for each in (hidden, probabilities))
            return torch.tanh(probabilities @ weight) + x

    checkpoint(block, torch.randn(8, 8, requires_grad=True), use_reentrant=False).sum().backward()
    gc.collect()
    assert len(made) == 4
    assert all(each.expired() for each in made)


def test_hooks_around_a_block_are_given_each_tensor_once() -> None:
    block, inputs = Block(), inputs_of()
    reduce_activation_memory(block, ("Block",))
    given: list[tuple[Any, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        given.append((tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()))
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(*inputs)
    assert len(given) == len(set(given))
    assert output.requires_grad


def test_what_is_made_again_has_the_autocast_of_the_forward_pass_or_none() -> None:
    on, off = Context("cpu", torch.bfloat16), Context("cpu", None)
    assert Context.of("cpu") == off
    assert isinstance(off(), nullcontext)
    with on():
        assert Context.of("cpu") == on
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
        assert isinstance(on(), nullcontext)
        with off():
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


def test_of_a_block_that_fails_nothing_is_decided_and_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[int] = []
    monkeypatch.setattr(Trace, "_settle", lambda self: settled.append(len(self._saved)))
    x = torch.ones(64, 64, requires_grad=True)
    for fails in (False, True):
        trace, held = Trace("cpu"), []
        with pytest.raises(LookupError) if fails else nullcontext(), trace:
            (x * x).exp()
            held = list(trace._saved)
            assert held
            if fails:
                raise LookupError
        assert {saved.tensor for saved in held} == {None}
        assert (trace._saved, trace._made) == ([], {})
        assert len(settled) == 1
