"""Products in 8 bits: the numbers of the formula, the errors of the format, and the ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.errors import ConfigError
from simpletuner.precision import product_trials, products, timing
from simpletuner.precision.linear import QuantizedLinear, exact_activations
from simpletuner.precision.product_trials import choose_products, chosen_products
from simpletuner.precision.products import (
    UNPACKED,
    Ways,
    has_8_bit_products,
    input_gradient,
    multiply,
    output_product,
    product_bytes,
    quantize_rows,
    ways_of,
)
from simpletuner.precision.quantize import NumberFormats, get_format, quantize, require_device

CPU = torch.device("cpu")
FORMATS = {"int8-quanto": 0.012, "int8dq-torchao": 0.012, "fp8-torchao": 0.04, "fp8uz-quanto": 0.04}
INT8 = ("int8-quanto", "int8dq-torchao")


def packed(name: str = "int8-quanto", rows: int = 48, columns: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    plain = nn.Linear(columns, rows).to(dtype)
    return QuantizedLinear(plain, get_format(name), "", quantizes_activations=True)


def step(layer: Any, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and gradient to the input."""
    x = x.clone().requires_grad_()
    output = layer(x)
    [found] = torch.autograd.grad(output, x, gradient)
    return output.detach(), found


def test_an_output_is_what_the_hand_computes() -> None:
    data = torch.tensor([[1, 0, -1], [2, 3, 0]], dtype=torch.int8)
    scale, bias = torch.tensor([[0.5], [0.25]]), torch.tensor([1.0, 0.0])
    # The largest number, 1.27, becomes 127: a scale of 0.01. 0.634 becomes 63, and -0.32 becomes -32.
    x = torch.tensor([[1.27, 0.634, -0.32], [0.0, 0.0, 0.0]])
    found = output_product(x, data, scale, bias, "direct")
    # 127 + 32 = 159 and 254 + 189 = 443; a row of zeros leaves the bias.
    expected = torch.tensor([[159 * 0.01 * 0.5 + 1, 443 * 0.01 * 0.25], [1.0, 0.0]])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_a_gradient_is_what_the_hand_computes() -> None:
    data = torch.tensor([[1, 0, -1], [2, 3, 0]], dtype=torch.int8)
    scale = torch.tensor([[0.5], [0.25]])
    # With the scales of the weight folded in, (2, 8) is (1, 2); 2 becomes 127, and 1 becomes 63.5, to even 64.
    found = input_gradient(torch.tensor([[2.0, 8.0]]), data, scale, "direct")
    expected = torch.tensor([[64 + 254.0, 381.0, -64.0]]) * 2 / 127
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_float8_rows_are_what_the_hand_computes() -> None:
    # 448 is the largest: a scale of 0.25. 17 / 0.25 = 68 is between 64 and 72, the next numbers; to even 64.
    rows, scales = quantize_rows(torch.tensor([[112.0, 17.0, -0.5]]), torch.float8_e4m3fn)
    assert scales.tolist() == [[0.25]]
    assert rows.float().tolist() == [[448.0, 64.0, -2.0]]


def test_kernels_take_sides_of_16_and_float8_a_copy_of_the_matrix_for_the_gradient() -> None:
    assert [has_8_bit_products(*sizes) for sizes in ((16, 32), (16, 24), (24, 16), (8, 8))] == [True, *[False] * 3]
    assert (products.MULTIPLE, products.LEAST_ROWS, products.PART) == (16, 32, 8_388_608)
    assert (product_trials.NUM_ROWS, product_trials.MARGIN, product_trials.LARGEST_ERROR) == (4096, 1.1, 0.1)
    assert ways_of(torch.int8) == ("direct", "direct")
    assert ways_of(torch.float8_e4m3fn) == Ways(output="direct", gradient="copied")


def test_int8_rows_are_those_of_torchao_s_training() -> None:
    from torchao.prototype.quantized_training.int8 import quantize_int8_rowwise

    x = torch.randn(40, 64)
    rows, scales = quantize_rows(x, torch.int8)
    data, theirs = quantize_int8_rowwise(x)
    torch.testing.assert_close(scales[:, 0], theirs.flatten())
    assert (rows - data).abs().max() <= 1  # one of two divides, the other multiplies
    assert (rows == data).float().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_output_and_gradient_are_as_near_to_float64_as_the_format(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(512, 256).to(dtype)
    layer = QuantizedLinear(plain, get_format(name), "", quantizes_activations=True)
    x, gradient = torch.randn(2, 20, 512).to(dtype), torch.randn(2, 20, 256).to(dtype)
    weight, bias = plain.weight.detach().double(), plain.bias.detach().double()
    exact = x.double() @ weight.T + bias, gradient.double() @ weight
    for found, right in zip(step(layer, x, gradient), exact, strict=True):
        assert found.dtype == dtype
        assert FORMATS[name] / 2 < (found - right).norm() / right.norm() < FORMATS[name]


@pytest.mark.parametrize("name", FORMATS)
def test_channels_of_very_different_size_keep_their_precision(name: str) -> None:
    """Output channels from a thousandth to a thousand: each has a scale, in the output and in the gradient."""
    torch.manual_seed(0)
    plain = nn.Linear(256, 128, bias=False)
    sizes = torch.logspace(-3, 3, 128)[:, None]
    plain.weight.data.mul_(sizes)
    layer = QuantizedLinear(plain, get_format(name), "", quantizes_activations=True)
    x, gradient = torch.randn(32, 256), torch.randn(32, 128) / sizes.T
    output, found = step(layer, x, gradient)
    right = x @ plain.weight.detach().T
    assert ((output - right).norm(dim=0) / right.norm(dim=0)).max() < 1.6 * FORMATS[name]
    right = gradient @ plain.weight.detach()
    assert (found - right).norm() / right.norm() < 1.3 * FORMATS[name]


@pytest.mark.parametrize("name", INT8)
def test_a_token_of_its_own_size_changes_no_other(name: str) -> None:
    layer, x = packed(name), torch.randn(40, 64)
    expected = layer(x)
    x[7] *= 1e4
    found = layer(x)
    others = [row for row in range(40) if row != 7]
    assert torch.equal(found[others], expected[others])
    torch.testing.assert_close(layer(x[7:8]), found[7:8], rtol=0, atol=0)  # and alone it is what it is among others


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so_in_its_token(name: str, bad: float) -> None:
    """fp16 finds out by it that its loss scale is too large, and a run that it diverges."""
    layer, x, gradient = packed(name), torch.randn(40, 64), torch.randn(40, 48)
    x[3, 5], gradient[4, 6] = bad, bad
    for found, row in zip(step(layer, x, gradient), (3, 4), strict=True):
        assert not found[row].isfinite().any()
        assert found[[each for each in range(40) if each != row]].isfinite().all()


@pytest.mark.parametrize("name", FORMATS)
def test_parts_of_many_tokens_give_the_bits_of_all_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, gradient = packed(name), torch.randn(3, 50, 64), torch.randn(3, 50, 48)
    expected = step(layer, x, gradient)
    counts: list[int] = []

    def counted(left: Tensor, right: Tensor) -> Tensor:
        counts.append(len(left))
        return multiply(left, right)

    monkeypatch.setattr(products, "PART", 64 * 40)
    monkeypatch.setattr(products, "multiply", counted)
    for found, right in zip(step(layer, x, gradient), expected, strict=True):
        torch.testing.assert_close(
            found, right, rtol=1e-6 if name not in INT8 else 0, atol=1e-6 if name not in INT8 else 0
        )
    assert counts == [40, 40, 40, 32] * 2  # the last 30 are filled up
    assert product_bytes(150, 48, 64) == 9 * 64 * 40 + 48 * 64


@pytest.mark.parametrize("name", FORMATS)
def test_a_copied_matrix_gives_the_same_numbers(name: str) -> None:
    layer, x, gradient = packed(name), torch.randn(40, 64), torch.randn(40, 48)
    expected = step(layer, x, gradient)
    layer.ways = Ways("copied", "direct" if layer.ways.gradient == "copied" else "copied")
    for found, right in zip(step(layer, x, gradient), expected, strict=True):
        torch.testing.assert_close(found, right)


def test_products_of_autocast_are_in_its_dtype_and_no_sum_is(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = packed("fp8-torchao"), torch.randn(40, 64)
    sums: list[Tensor] = []

    def noted(left: Tensor, right: Tensor) -> Tensor:
        sums.append(multiply(left, right))
        return sums[-1]

    monkeypatch.setattr(products, "multiply", noted)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert sums[0].dtype == torch.float32
    assert not torch.equal(sums[0], sums[0].bfloat16().float())


def test_the_backward_pass_keeps_nothing_but_the_packed_weight() -> None:
    layer = packed()
    saved: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        layer(torch.randn(40, 64, requires_grad=True))
    assert {id(tensor) for tensor in saved} == {id(part) for part in layer.parts.values()}


@pytest.mark.parametrize(("name", "rows"), [("int8-quanto", 40), ("nf4-bnb", 48)])
def test_shapes_and_formats_without_8_bit_products_are_unpacked(name: str, rows: int) -> None:
    layer, x = packed(name, rows), torch.randn(5, 64)
    assert not layer.is_in_8_bits
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_activations_are_exact_for_a_while() -> None:
    layer, x = packed(), torch.randn(5, 64)
    quantized = layer(x)
    with exact_activations(nn.Sequential(layer)):
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer(x), quantized)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8-quanto", "fp8-torchao"])
def test_a_compiler_sees_one_graph_for_all_sizes(name: str) -> None:
    layer = packed(name)
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=count, fullgraph=True)  # a break in the graph is an error
    for rows in (40, 50, 60, 70):
        x, gradient = torch.randn(2, rows, 64), torch.randn(2, rows, 48)
        for found, right in zip(step(compiled, x, gradient), step(layer, x, gradient), strict=True):
            torch.testing.assert_close(found, right)
    assert len(graphs) == 2  # the first size, and then all
    torch._dynamo.reset()


ACCELERATOR = torch.device("meta")  # a name for it: trials are asked about a device that is no CPU


@pytest.fixture
def on_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trials compute on the CPU what they would on an accelerator."""
    try_products = product_trials.try_products
    monkeypatch.setattr(product_trials, "NUM_ROWS", 48)
    monkeypatch.setattr(product_trials, "try_products", lambda layer, device, *rest: try_products(layer, CPU, *rest))


def timed(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[int]:
    """Lets trials take these seconds; returns how many ways were timed each time."""
    counts: list[int] = []

    def median_seconds(ways: list[Any], device: torch.device) -> list[float]:
        counts.append(len(ways))
        return list(seconds[: len(ways)])

    monkeypatch.setattr(product_trials, "median_seconds", median_seconds)
    return counts


@pytest.mark.parametrize(
    ("seconds", "way", "text"),
    [
        ((0.002, 0.001, 0.0015), "direct", "in 8 bits (1.00 ms in 8 bits, 2.00 ms unpacked)"),
        ((0.002, 0.0015, 0.001), "copied", "in 8 bits (1.00 ms in 8 bits, 2.00 ms unpacked)"),
        ((0.002, 0.00195, 0.0019), "unpacked", "unpacked (1.90 ms in 8 bits, 2.00 ms unpacked)"),
    ],
)
@pytest.mark.usefixtures("on_processor")
def test_the_fastest_way_computes_and_is_named(
    monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], way: Any, text: str
) -> None:
    counts = timed(monkeypatch, *seconds)
    model: Any = nn.Sequential(packed(), packed(), packed(rows=64))
    lines = choose_products(model, ACCELERATOR, torch.float32, {}, is_timed=True)
    assert counts == [3] * 4  # two shapes, each forward and backward
    assert lines[0] == f"products of int8 48x64: output {text}, gradient {text}"
    assert [layer.ways for layer in model] == [Ways(way, way)] * 3
    assert ("activations are not quantized" in lines[-1]) == (way == "unpacked")
    assert chosen_products(model) == {"int8 48x64": [way, way], "int8 64x64": [way, way]}


@pytest.mark.usefixtures("on_processor")
def test_numbers_that_are_wrong_and_kernels_that_fail_are_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = timed(monkeypatch, 2.0, 1.0, 1.0)
    monkeypatch.setattr(products, "multiply", lambda left, right: multiply(left, right).flip(1))
    layer = packed()
    [line, _] = choose_products(layer, ACCELERATOR, torch.float32, {}, is_timed=True)
    assert "an error of 1." in line
    assert layer.ways == UNPACKED

    def by_columns(left: Tensor, right: Tensor) -> Tensor:
        if right.is_contiguous():
            raise RuntimeError("right side must lie by columns\nat line 3")
        return multiply(left, right)

    monkeypatch.setattr(products, "multiply", by_columns)
    layer = packed()
    [line] = choose_products(layer, ACCELERATOR, torch.float32, {}, is_timed=True)
    assert layer.ways == Ways("direct", "copied")
    assert counts == [2, 2]  # without a copy of the transpose, and with one

    def missing(left: Tensor, right: Tensor) -> Tensor:
        raise NotImplementedError("no such kernel\nat line 4")

    monkeypatch.setattr(products, "multiply", missing)
    layer = packed()
    [line, _] = choose_products(layer, ACCELERATOR, torch.float32, {}, is_timed=True)
    assert line.endswith("output unpacked (no such kernel), gradient unpacked (no such kernel)")
    assert layer.ways == UNPACKED


@pytest.mark.usefixtures("on_processor")
def test_an_earlier_choice_stays_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = timed(monkeypatch, 2.0, 1.0, 1.0)
    layer = packed()
    known = {"int8 48x64": ["unpacked", "copied"]}
    [line] = choose_products(layer, ACCELERATOR, torch.float32, known, is_timed=True)
    assert line.endswith("output unpacked (as before), gradient in 8 bits (as before)")
    assert layer.ways == Ways("unpacked", "copied")
    assert not counts
    layer = packed()
    choose_products(layer, CPU, torch.float32, known, is_timed=True)  # also on a CPU that goes on with it
    assert layer.ways == Ways("unpacked", "copied")


@pytest.mark.usefixtures("on_processor")
def test_an_earlier_choice_goes_where_it_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, 2.0, 1.0, 1.0)

    def missing(left: Tensor, right: Tensor) -> Tensor:
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(products, "multiply", missing)
    layer = packed()
    choose_products(layer, ACCELERATOR, torch.float32, {"int8 48x64": ["direct", "copied"]}, is_timed=True)
    assert layer.ways == UNPACKED


@pytest.mark.usefixtures("on_processor")
def test_where_nothing_is_timed_all_are_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = timed(monkeypatch, 1.0, 2.0, 2.0)
    layer = packed()
    choose_products(layer, ACCELERATOR, torch.float32, {}, is_timed=False)
    assert layer.ways == Ways("direct", "direct")
    assert not counts


@pytest.mark.usefixtures("on_processor")
def test_all_ways_are_really_timed_in_the_dtype_of_the_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    given: set[tuple[str, torch.dtype, torch.Size]] = set()
    for name in ("output", "gradient"):
        compute = getattr(QuantizedLinear, name)

        def noted(layer: Any, x: Tensor, *rest: Any, name: str = name, compute: Any = compute) -> Tensor:
            given.add((name, x.dtype, x.shape))
            return compute(layer, x, *rest)

        monkeypatch.setattr(QuantizedLinear, name, noted)
    [line] = choose_products(nn.Sequential(packed()), ACCELERATOR, torch.bfloat16, {}, is_timed=True)[:1]
    assert line.count("ms unpacked") == 2
    # So many rows as `on_processor` says, of the layer's 64 inputs and 48 outputs.
    assert given == {("output", torch.bfloat16, (48, 64)), ("gradient", torch.bfloat16, (48, 48))}


def test_the_middle_of_five_rounds_counts_after_three_that_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ways take turns; those rounds take 4, 1, 5, 2 and 3 s of the first way, and twice as much of the other."""
    rounds = (100.0, 100.0, 100.0, 4.0, 1.0, 5.0, 2.0, 3.0)
    taken = iter([length * factor for length in rounds for factor in (1, 2)])
    clock, calls = [0.0], []

    def way(name: str) -> None:
        calls.append(name)
        clock[0] += next(taken)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert timing.median_seconds([partial(way, "first"), partial(way, "second")], CPU) == [3.0, 6.0]
    assert calls == ["first", "second"] * 8


def test_a_processor_multiplies_in_8_bits_without_a_trial() -> None:
    layer = packed()
    assert choose_products(layer, CPU, torch.float32, {}, is_timed=True) == []
    assert layer.ways == Ways("direct", "direct")


def test_a_device_without_8_bit_products_is_named_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(left: Tensor, right: Tensor) -> Tensor:
        raise RuntimeError("needs compute capability 8.9")

    monkeypatch.setattr(products, "multiply", cannot)
    require_device(NumberFormats("fp8-torchao"), CPU, torch.bfloat16)
    for formats, key in (
        (NumberFormats("fp8-torchao", quantizes_activations=True), "quantize_activations"),
        (NumberFormats("int8dq-torchao"), "base_model_precision"),
    ):
        with pytest.raises(ConfigError, match=rf"(?s){key}.*with quantized activations does not work.*needs compute"):
            require_device(formats, CPU, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_row_of_zeros_is_zeros_in_8_bits_with_a_scale_that_divides(dtype: torch.dtype) -> None:
    rows, scales = quantize_rows(torch.zeros(2, 4), dtype)
    assert torch.equal(rows.float(), torch.zeros(2, 4))
    assert (scales > 0).all()


def test_a_layer_whose_shape_has_no_products_in_8_bits_stays_unpacked_and_is_not_named(on_processor: None) -> None:
    model: Any = nn.Sequential(packed(), packed(rows=50))
    choose_products(model, ACCELERATOR, torch.float32, {}, is_timed=False)
    assert model[0].ways == Ways("direct", "direct")
    assert model[1].ways == UNPACKED
    assert list(chosen_products(model)) == ["int8 48x64"]


def test_layers_are_packed_without_products_in_8_bits_unless_these_are_asked_for() -> None:
    for asked in ({}, {"quantizes_activations": True}):
        model: Any = quantize(nn.Sequential(nn.Linear(64, 48)), "int8-quanto", **asked)
        assert model[0].is_in_8_bits == bool(asked)
