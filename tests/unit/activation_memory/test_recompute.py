"""What keeps little must compute what the plain form computes, forward and backward, and really keep little."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU, GELU
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.activation_memory.gates import gelu, gelu_gated, silu_gated
from simpletuner.activation_memory.linears import linear, use_recomputing_linears
from simpletuner.activation_memory.modules import reduce_activation_memory
from simpletuner.activation_memory.norms import rms_norm
from simpletuner.activation_memory.recompute import cast, recompute_fn_of, recomputed
from simpletuner.adapters.lokr import kron_linear
from simpletuner.models.omnigen.attention import rotate


@pytest.fixture(autouse=True)
def seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", 0)


def kept_storages(function: Callable[[], Any]) -> set[int]:
    """Storages that autograd saves meanwhile."""
    kept: set[int] = set()

    def keep(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return kept


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


ANGLES = torch.randn(1, 1, 3, 2, dtype=torch.float64).repeat(1, 1, 1, 2)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda x, weight: rms_norm(x, weight, 1e-5), ((2, 3, 4), (4,))),
    "norm without weight": (lambda x: rms_norm(x, None, 1e-5), ((2, 3, 4),)),
    "gate": (silu_gated, ((2, 3, 8),)),
    "gelu": (gelu, ((2, 3, 8),)),
    "gelu gate": (gelu_gated, ((2, 3, 8),)),
    "rotation": (lambda x: rotate(x, ANGLES.cos(), ANGLES.sin()), ((2, 2, 3, 4),)),
    "linear": (lambda x, weight, bias: linear(rms_norm(x, None, 1e-5), weight, bias), ((2, 3, 4), (5, 4), (5,))),
    "kron": (kron_linear, ((2, 3, 6), (4, 3), (5, 2))),
    "kron to fewer features": (kron_linear, ((3, 10), (2, 2), (3, 5))),
    "kron, low-rank": (kron_linear, ((2, 3, 6), (4, 3), (1, 2), (5, 1))),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    assert torch.autograd.gradcheck(function, tuple(numbers(*shape) for shape in shapes))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_input_that_needs_no_gradient_gets_none(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    for chosen in range(len(shapes)):
        inputs = [numbers(*shape).requires_grad_(i == chosen) for i, shape in enumerate(shapes)]
        function(*inputs).sum().backward()
        assert [tensor.grad is not None for tensor in inputs] == [i == chosen for i in range(len(shapes))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_recomputed_blocks_and_used_twice_give_the_same_gradients(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    inputs = [numbers(*shape) for shape in shapes]

    def twice(*inputs: Tensor) -> Tensor:
        output = function(*inputs)
        return (output * output).sum() + output.sum()

    plain = torch.autograd.grad(twice(*inputs), inputs)
    again = torch.autograd.grad(checkpoint(twice, *inputs, use_reentrant=False), inputs)
    for expected, actual in zip(plain, again, strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_without_gradients_values_are_the_same_and_nothing_is_kept(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    inputs = [numbers(*shape) for shape in shapes]
    expected = function(*inputs)
    with torch.no_grad():
        actual = function(*inputs)
        assert not kept_storages(lambda: function(*inputs))
    assert torch.equal(actual, expected)
    assert recompute_fn_of(actual).ingredients[0] is actual


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_compiler_gets_plain_operations(name: str) -> None:
    function, shapes = FUNCTIONS[name]
    inputs = [numbers(*shape) for shape in shapes]
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), function(*inputs))


def plain_swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


def plain_rotation(x: Tensor) -> Tensor:
    first, second = x.float().chunk(2, dim=-1)
    angles = ANGLES.float()
    return (torch.cat([first, second], -1) * angles.cos() + torch.cat([-second, first], -1) * angles.sin()).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("lean", "plain", "shape"),
    [
        (lambda x: reduce_activation_memory(RMSNorm(8, eps=1e-5).to(x.dtype))(x), RMSNorm(8, eps=1e-5), (2, 3, 8)),
        (lambda x: reduce_activation_memory(nn.RMSNorm(8).to(x.dtype))(x), nn.RMSNorm(8), (2, 3, 8)),
        (silu_gated, plain_swiglu, (2, 3, 8)),
        (lambda x: rotate(x, ANGLES.float().cos(), ANGLES.float().sin()), plain_rotation, (2, 2, 3, 4)),
    ],
)
def test_each_number_format_gives_what_the_public_form_gives_in_float32(
    lean: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = numbers(*shape, dtype=dtype)
    output = lean(x)
    wide = x.detach().float().requires_grad_()
    expected = plain(wide)
    assert output.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected, rtol=rounding, atol=rounding)
    [gradient], [wanted] = torch.autograd.grad(output.sum(), x), torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(gradient.float(), wanted, rtol=2 * rounding, atol=2 * rounding)


def test_a_layer_behind_a_norm_keeps_the_norms_input_alone() -> None:
    norm, factors = (
        reduce_activation_memory(RMSNorm(6, eps=1e-5)),
        (torch.randn(2, 3), numbers(4, 2, dtype=torch.float32)),
    )
    x = numbers(5, 6, dtype=torch.float32) * 1
    kept = kept_storages(lambda: kron_linear(norm(x), *factors))
    assert kept == {tensor.untyped_storage().data_ptr() for tensor in (x, norm.weight, *factors)}


def test_a_tensor_that_was_changed_in_place_is_not_made_again() -> None:
    x, w1, w2 = numbers(5, 6), numbers(2, 3), numbers(4, 2)

    def changed(in_place: bool) -> Tensor:
        made = recomputed(torch.exp, x)
        return made.add_(1) if in_place else made + 1

    for in_place in (True, False):
        [gradient] = torch.autograd.grad(kron_linear(changed(in_place), w1, w2).square().sum(), w2)
        expected = (x.exp() + 1) @ torch.kron(w1, w2).T
        [wanted] = torch.autograd.grad(expected.square().sum(), w2)
        torch.testing.assert_close(gradient, wanted)


def test_small_and_large_tensors_have_the_same_dtypes_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(5, 6, dtype=torch.bfloat16)
    for large in (0, 1 << 20):
        monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", large)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert recomputed(torch.prod, x).dtype == torch.bfloat16  # autocast's own would be float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_decides_the_product_and_not_the_norm(dtype: torch.dtype) -> None:
    norm, x = reduce_activation_memory(RMSNorm(6, eps=1e-5).to(dtype)), numbers(5, 6, dtype=dtype)
    w1, w2 = numbers(2, 3, dtype=torch.float32), numbers(4, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normed = norm(x)
        narrow = cast(normed, torch.bfloat16)
        output = kron_linear(narrow, w1.bfloat16(), w2.bfloat16())
    assert (normed.dtype, output.dtype) == (dtype, torch.bfloat16)
    assert recompute_fn_of(narrow).ingredients[0] is x
    [gradient] = torch.autograd.grad(output.float().square().sum(), w2)
    wide = RMSNorm(6, eps=1e-5)(x.detach().float()) @ torch.kron(w1, w2).T
    [wanted] = torch.autograd.grad(wide.square().sum(), w2)
    torch.testing.assert_close(gradient, wanted, rtol=0.03, atol=0.1)


def test_hooks_of_a_lean_norm_fire_and_a_norm_with_a_bias_stays_as_it_was() -> None:
    norm = reduce_activation_memory(RMSNorm(6, eps=1e-5))
    seen: list[str] = []
    norm.register_forward_hook(lambda *args: seen.append("forward"))
    norm.register_full_backward_hook(lambda *args: seen.append("backward"))
    norm(numbers(5, 6, dtype=torch.float32)).sum().backward()
    assert seen == ["forward", "backward"]
    shifted = RMSNorm(6, eps=1e-5, bias=True)
    x = numbers(5, 6, dtype=torch.float32)
    expected = shifted(x)
    assert torch.equal(reduce_activation_memory(shifted)(x), expected)


def test_a_trained_linear_layer_keeps_the_norms_input_alone() -> None:
    norm, layer = reduce_activation_memory(RMSNorm(6, eps=1e-5)), nn.Linear(6, 4)
    use_recomputing_linears([layer])
    x = numbers(5, 6, dtype=torch.float32) * 1
    kept = kept_storages(lambda: layer(norm(x)))
    assert kept == {tensor.untyped_storage().data_ptr() for tensor in (x, norm.weight, layer.weight)}


@pytest.mark.parametrize("module", [GELU(6, 8, approximate="tanh"), GELU(6, 8), GEGLU(6, 8)])
def test_the_public_activations_give_the_same_numbers_and_keep_their_projection_alone(module: GELU | GEGLU) -> None:
    x = numbers(5, 6, dtype=torch.float32) * 1
    expected = module(x)
    wanted = torch.autograd.grad(expected.square().sum(), [x, module.proj.weight])
    reduce_activation_memory(module)
    torch.testing.assert_close(module(x), expected)
    gradients = torch.autograd.grad(module(x).square().sum(), [x, module.proj.weight])
    for actual, right in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(actual, right)
    kept = kept_storages(lambda: module(x))
    assert len(kept) == 3  # the input and weight of the projection, and its output


def test_small_tensors_are_kept_since_making_them_again_would_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", 8 * 5 * 6)
    for rows, is_recomputed_tensor in ((4, False), (5, True)):
        made = recomputed(torch.exp, numbers(rows, 6))
        assert (recompute_fn_of(made).ingredients[0] is not made) == is_recomputed_tensor
