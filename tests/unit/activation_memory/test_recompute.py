"""What keeps little must compute what the plain form computes, forward and backward, and really keep little."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from simpletuner.activation_memory import recompute
from simpletuner.activation_memory.convolutions import frozen_conv2d
from simpletuner.activation_memory.gates import silu_gated
from simpletuner.activation_memory.linears import follow_input_dtype, linear
from simpletuner.activation_memory.modules import reduce_activation_memory
from simpletuner.activation_memory.norms import rms_norm
from simpletuner.activation_memory.recompute import is_large, recomputed
from simpletuner.activation_memory.rotation import rotate_pairs
from simpletuner.adapters.lokr import kron_linear
from simpletuner.models.omnigen.attention import rotate

LARGE = recompute.LARGE  # of a run; these tests call everything large


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


def lean(module: nn.Module) -> nn.Module:
    return reduce_activation_memory(module, ())


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


ANGLES = torch.randn(1, 1, 3, 2, dtype=torch.float64).repeat(1, 1, 1, 2)
OF_PAIRS = ANGLES[..., :2].repeat_interleave(2, -1)
FUNCTIONS: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "norm": (lambda x, weight: rms_norm(x, weight, 0.5), ((2, 3, 4), (4,))),  # an eps that counts
    "norm without weight": (lambda x: rms_norm(x, None, 0.5), ((2, 3, 4),)),
    "gate": (silu_gated, ((2, 3, 8),)),
    "rotation": (lambda x: rotate(x, ANGLES.cos(), ANGLES.sin()), ((2, 2, 3, 4),)),
    "rotation of pairs": (lambda x: rotate_pairs(x, OF_PAIRS.cos(), OF_PAIRS.sin()), ((2, 2, 3, 4),)),
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


def test_each_ingredient_gets_the_gradient_that_is_its_own() -> None:
    """Also where one before it needs none: of a * b + c that to b is a."""
    a, b, c = torch.full((2,), 3.0), torch.full((2,), 5.0, requires_grad=True), torch.zeros(2)
    recomputed(lambda a, b, c: a * b + c, a, b, c).sum().backward()
    assert b.grad is not None
    assert b.grad.tolist() == [3, 3]


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
    ("ours", "plain", "shape"),
    [
        (lambda x: lean(RMSNorm(8, eps=1e-5).to(x.dtype))(x), RMSNorm(8, eps=1e-5), (2, 3, 8)),
        (lambda x: lean(nn.RMSNorm(8).to(x.dtype))(x), nn.RMSNorm(8), (2, 3, 8)),
        (silu_gated, plain_swiglu, (2, 3, 8)),
        (lambda x: rotate(x, ANGLES.float().cos(), ANGLES.float().sin()), plain_rotation, (2, 2, 3, 4)),
    ],
)
def test_each_number_format_gives_what_the_public_form_gives_in_float32(
    ours: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = numbers(*shape, dtype=dtype)
    output = ours(x)
    wide = x.detach().float().requires_grad_()
    expected = plain(wide)
    assert output.dtype == dtype
    rounding = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(output.float(), expected, rtol=rounding, atol=rounding)
    [gradient], [wanted] = torch.autograd.grad(output.sum(), x), torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(gradient.float(), wanted, rtol=2 * rounding, atol=2 * rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pairs_are_rotated_with_the_bits_of_diffusers_and_the_gradient_of_float32(dtype: torch.dtype) -> None:
    attention = FluxAttention(32, heads=2, dim_head=16).to(dtype).requires_grad_(False)
    angles = torch.randn(3, 8).repeat_interleave(2, 1)
    given = numbers(1, 3, 32, dtype=dtype), None, None, (angles.cos(), angles.sin())
    wide = copy.deepcopy(attention).float()
    x = given[0].detach().float().requires_grad_()
    [wanted] = torch.autograd.grad(wide(x, *given[1:]).sum(), x)
    expected = attention(*given)
    output = lean(attention)(*given)
    assert type(attention.processor) is not FluxAttnProcessor
    assert torch.equal(output, expected)
    [gradient] = torch.autograd.grad(output.sum(), given[0])
    rounding = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.float(), wanted, rtol=rounding, atol=rounding)


def test_small_and_large_tensors_have_the_same_dtypes_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    x = numbers(5, 6, dtype=torch.bfloat16)
    for large in (0, 1 << 20):
        monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", large)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert recomputed(torch.prod, x).dtype == torch.bfloat16  # autocast's own would be float32


def test_autocast_does_not_change_the_dtype_of_a_norm() -> None:
    norm, x = lean(RMSNorm(6, eps=1e-5)), numbers(5, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x).dtype == torch.float32


def test_without_an_eps_a_norm_adds_that_of_the_format_it_computes_in() -> None:
    """2^-23 is the step of float32; that of bfloat16 would be larger than the squares of these numbers."""
    norm, x = nn.RMSNorm(6, dtype=torch.bfloat16), 1e-2 * torch.randn(5, 6).bfloat16()
    x.requires_grad_()
    wide = x.detach().float()
    expected = wide / (wide.square().mean(dim=-1, keepdim=True) + 2**-23).sqrt()
    torch.testing.assert_close(lean(norm)(x).float(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_a_norm_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    """Half of the last bit away from those of float64; each operation in 8 bits would add such an error."""
    x, weight = (torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in ((64, 48), (48,)))
    gradient = torch.randn(64, 48, dtype=dtype)
    output = rms_norm(x, weight, 1e-3)
    assert output.grad_fn is not None
    assert output.grad_fn.name() == "_RmsNormBackward"  # on the CPU in a third of the time of torch's own
    found = torch.autograd.grad(output, (x, weight), gradient)
    wide = [each.detach().double().requires_grad_() for each in (x, weight)]
    normed = wide[0] / (wide[0].square().mean(-1, keepdim=True) + 1e-3).sqrt() * wide[1]
    for actual, exact in zip(found, torch.autograd.grad(normed, wide, gradient.double()), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), exact, rtol=0.51 * torch.finfo(dtype).eps, atol=2e-6)


def test_hooks_of_a_lean_norm_fire_and_a_norm_with_a_bias_stays_as_it_was() -> None:
    norm = lean(RMSNorm(6, eps=1e-5))
    seen: list[str] = []
    norm.register_forward_hook(lambda *args: seen.append("forward"))
    norm.register_full_backward_hook(lambda *args: seen.append("backward"))
    norm(numbers(5, 6, dtype=torch.float32)).sum().backward()
    assert seen == ["forward", "backward"]
    shifted = RMSNorm(6, eps=1e-5, bias=True)
    nn.init.normal_(shifted.bias)  # it begins as zeros
    x = numbers(5, 6, dtype=torch.float32)
    expected = shifted(x)
    assert torch.equal(lean(shifted)(x), expected)


@pytest.mark.parametrize(("stride", "dilation", "groups"), [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)])
def test_a_frozen_convolution_gives_the_gradients_of_the_plain_one_and_keeps_its_weight_alone(
    stride: int, dilation: int, groups: int
) -> None:
    layer = nn.Conv2d(4, 6, 3, stride, 1, dilation, groups).requires_grad_(False)
    x = numbers(2, 4, 7, 5, dtype=torch.float32)
    expected = layer(x)
    [wanted] = torch.autograd.grad(expected.square().sum(), x)
    lean(layer)
    kept = kept_storages(lambda: layer(x * 1))
    assert kept == {layer.weight.untyped_storage().data_ptr()}
    output = layer(x)
    [gradient] = torch.autograd.grad(output.square().sum(), x)
    assert torch.equal(output, expected)
    torch.testing.assert_close(gradient, wanted)


def test_a_convolution_that_trains_or_pads_otherwise_stays_as_it_was() -> None:
    x = numbers(2, 4, 7, 5, dtype=torch.float32)
    for layer in (
        nn.Conv2d(4, 6, 3),
        nn.Conv2d(4, 6, 3, bias=False),
        nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(4, 4, 3, 1, "same"),
    ):
        expected = torch.autograd.grad(layer(x).square().sum(), [x, layer.weight])
        for actual, wanted in zip(
            torch.autograd.grad(lean(layer)(x).square().sum(), [x, layer.weight]), expected, strict=True
        ):
            assert torch.equal(actual, wanted)
    frozen = nn.Conv2d(4, 4, 3, 1, "same").requires_grad_(False)
    assert torch.equal(frozen_conv2d(frozen, x), frozen(x))
    reflecting = nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect").requires_grad_(False)
    for layer in (frozen, reflecting):
        [wanted] = torch.autograd.grad(layer(x).square().sum(), x)
        output = frozen_conv2d(frozen, x) if layer is frozen else lean(layer)(x)
        torch.testing.assert_close(torch.autograd.grad(output.square().sum(), x), (wanted,))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 4])
def test_the_gradient_of_a_frozen_convolution_has_the_layout_of_its_input(
    layout: torch.memory_format, groups: int
) -> None:
    """Sana's tokens come to its convolutions channels last; a gradient of another layout made what follows slow."""
    layer = nn.Conv2d(4, 4, 3, 2, 1, groups=groups).double().requires_grad_(False)
    x = numbers(2, 4, 6, 5).detach().to(memory_format=layout).requires_grad_()
    seen: list[Tensor] = []
    inner = x * 1
    inner.register_hook(seen.append)
    [actual] = torch.autograd.grad(frozen_conv2d(layer, inner).square().sum(), x)
    [wanted] = torch.autograd.grad(layer(x).square().sum(), x)
    assert seen[0].is_contiguous(memory_format=layout)
    torch.testing.assert_close(actual, wanted)


def test_small_tensors_are_kept_since_making_them_again_would_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("simpletuner.activation_memory.recompute.LARGE", 8 * 5 * 6)
    for rows, is_computed_again in ((4, False), (5, True)):
        x = numbers(rows, 6) * 1
        kept = kept_storages(lambda x=x: recomputed(torch.exp, x))
        assert (x.untyped_storage().data_ptr() in kept) == is_computed_again


@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 2**18), (torch.bfloat16, 2**19)])
def test_large_begins_at_a_mebibyte(dtype: torch.dtype, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "LARGE", LARGE)
    found = [is_large(torch.empty(size, dtype=dtype, device="meta")) for size in (count, count - 1)]
    assert found == [True, False]


def test_a_gate_and_a_norm_keep_their_inputs_alone() -> None:
    gate_up, x, weight = numbers(2, 3, 8), numbers(2, 3, 4), numbers(4)
    assert kept_storages(lambda: silu_gated(gate_up)) == {gate_up.data_ptr()}
    assert kept_storages(lambda: rms_norm(x, weight, 1e-5)) == {x.data_ptr(), weight.data_ptr()}
    norm = lean(nn.RMSNorm(4, dtype=torch.float64))
    assert kept_storages(lambda: norm(x)) == {x.data_ptr(), norm.weight.data_ptr()}


def test_a_frozen_convolution_computes_in_the_dtype_of_autocast_in_both_passes() -> None:
    layer = nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False)
    x = numbers(2, 4, 7, 5, dtype=torch.float32)
    found = []
    for _ in ("plain", "lean"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(x)
        found.append((output, *torch.autograd.grad(output.float().square().sum(), x)))
        lean(layer)
    (expected, wanted), (actual, gradient) = found
    assert (actual.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)
    torch.testing.assert_close(gradient, wanted, rtol=0.02, atol=0.02)


def test_a_bias_that_trains_beside_a_frozen_weight_gets_its_gradient() -> None:
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.requires_grad_(False)
    lean(layer)(numbers(2, 4, 7, 5, dtype=torch.float32)).sum().backward()
    assert layer.bias is not None
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [2 * 5 * 3] * 6  # each of the outputs adds it once


def test_a_layer_that_derives_from_linear_computes_as_it_did() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plain, doubled = nn.Linear(3, 2), Doubled(3, 2)
    follow_input_dtype([plain, doubled])
    doubled.load_state_dict(plain.state_dict())
    x = torch.ones(1, 3)
    assert torch.equal(doubled(x), 2 * plain(x))
    assert plain(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("norm", "shape", "dtype"),
    [(RMSNorm(6, eps=1e-5), (5, 6), torch.bfloat16), (nn.RMSNorm((3, 4)), (5, 3, 4), torch.float32)],
)
def test_a_norm_of_another_format_or_of_several_axes_computes_as_it_did(
    norm: nn.Module, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    for weight in norm.parameters():
        nn.init.normal_(weight)
    x = numbers(*shape, dtype=dtype)
    expected = norm(x)
    actual = lean(norm)(x)
    assert actual.dtype == expected.dtype
    assert torch.equal(actual, expected)


def test_a_backward_pass_under_autocast_makes_the_same_numbers_again() -> None:
    """A product in bfloat16, which has 8 bits, would be 1."""
    z, x, y = torch.ones(1, 1, requires_grad=True), torch.tensor([[1 + 2**-10]]), torch.ones(1, 1)
    output = recomputed(lambda z, x, y: z * (x @ y), z, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [to_z] = torch.autograd.grad(output, z)
    assert to_z.item() == 1 + 2**-10
