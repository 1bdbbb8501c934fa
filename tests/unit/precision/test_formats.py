"""Packed weights: as small as promised, the libraries' own numbers, and gradients of what was computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simpletuner.config.options import all_options
from simpletuner.errors import ConfigError
from simpletuner.precision.formats import group_size, pack_bits, unpack_bits
from simpletuner.precision.linear import QuantizedLinear
from simpletuner.precision.mixed import DTYPES, autocast
from simpletuner.precision.products import UNPACKED
from simpletuner.precision.quantize import (
    NumberFormats,
    copy_unpacked,
    get_format,
    quantize,
    quantized_layers,
    require_device,
    saved_bytes,
)

# Bits per weight of a 256 x 512 matrix in bfloat16, scales included, and the relative error of normal weights.
PROMISED = {
    "int8-quanto": (8.04, 0.009),
    "int8-torchao": (8.07, 0.009),
    "int8dq-torchao": (8.07, 0.009),
    "fp8-quanto": (8.04, 0.03),
    "fp8uz-quanto": (8.04, 0.03),
    "fp8-torchao": (8.07, 0.03),
    "fp8wo-torchao": (8.07, 0.03),
    "int4-quanto": (4.26, 0.12),
    "int4-torchao": (4.26, 0.12),
    "nf4-bnb": (4.51, 0.11),
    "int2-quanto": (2.26, 0.55),
}


def layer(dtype: torch.dtype = torch.bfloat16, columns: int = 512, rows: int = 256) -> nn.Linear:
    torch.manual_seed(0)
    made = nn.Linear(columns, rows).to(dtype)
    nn.init.normal_(made.weight, std=0.02)
    return made


def test_every_value_of_the_option_is_a_format() -> None:
    assert set(all_options()["base_model_precision"].choices) == {*PROMISED, "no_change"}


@pytest.mark.parametrize("name", PROMISED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_is_as_small_and_as_near_as_promised(name: str, dtype: torch.dtype) -> None:
    plain = layer(dtype)
    packed = QuantizedLinear(plain, get_format(name))
    size = sum(part.nbytes for part in packed.parts.values())
    bits, error = PROMISED[name]
    assert size == get_format(name).num_bytes(256, 512, dtype.itemsize)
    if dtype == torch.bfloat16:
        assert size * 8 / plain.weight.numel() == pytest.approx(bits, abs=0.03)
    assert not [name for name, _ in packed.named_parameters() if name != "bias"]
    difference = (packed.weight - plain.weight).float().norm() / plain.weight.float().norm()
    assert difference < error


def by_library(name: str, weight: Tensor) -> Tensor:
    """What the library's own tensor says that it stands for."""
    from optimum.quanto import AbsmaxOptimizer, qtypes
    from optimum.quanto.tensor import quantize_weight

    if name in ("int8-quanto", "fp8-quanto"):
        qtype = qtypes["qint8" if name.startswith("int8") else "qfloat8_e4m3fn"]
        scale = AbsmaxOptimizer()(weight, qtype=qtype, axis=0)
        return quantize_weight(weight, qtype=qtype, axis=0, scale=scale, optimized=False).dequantize()
    if name == "nf4-bnb":
        from bitsandbytes.nn import Params4bit

        quantized = Params4bit(weight, quant_type="nf4", compress_statistics=False, blocksize=64).to("cpu")
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(quantized.data, quantized.quant_state)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False).to(weight.dtype)
    made.weight.data.copy_(weight)
    quantize_(made, Int8WeightOnlyConfig() if name.startswith("int8") else Float8WeightOnlyConfig())
    return made.weight.dequantize()


@pytest.mark.parametrize("name", ["int8-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao", "nf4-bnb"])
def test_the_numbers_are_the_library_s_own(name: str) -> None:
    plain = layer(torch.float32)
    packed = QuantizedLinear(plain, get_format(name))
    torch.testing.assert_close(packed.weight, by_library(name, plain.weight.detach()), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("name", "bits"), [("int4-quanto", 4), ("int2-quanto", 2)])
def test_four_and_two_bits_are_those_of_quanto(name: str, bits: int) -> None:
    """By quanto's formula: rounded (weight + shift) / scale, with the shift and scale of its optimizer."""
    from optimum.quanto import MaxOptimizer, qtypes

    weight = layer(torch.float32).weight.detach()
    scale, shift = MaxOptimizer()(weight, qtype=qtypes[f"qint{bits}"], axis=0, group_size=128)
    rounded = torch.clamp(torch.round((weight.reshape(-1, 128) + shift) / scale), 0, 2**bits - 1)
    packed = QuantizedLinear(layer(torch.float32), get_format(name))
    torch.testing.assert_close(packed.weight, (rounded * scale - shift).view_as(weight), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("columns", "size"),
    [(512, 128), (128, 128), (96, 96), (192, 96), (160, 32), (64, 64), (32, 32), (16, 16), (33, 33), (100, 100)],
)
def test_a_group_is_the_largest_multiple_of_32_up_to_128_that_divides_a_row(columns: int, size: int) -> None:
    assert group_size(columns) == size


@pytest.mark.parametrize(("bits", "byte"), [(4, 0x21), (2, 0b11_00_10_01)])
def test_the_first_value_lies_in_the_lowest_bits(bits: int, byte: int) -> None:
    values = torch.tensor([[1, 2] if bits == 4 else [1, 2, 0, 3]], dtype=torch.uint8)
    assert pack_bits(values, bits).tolist() == [[byte]]
    assert unpack_bits(torch.tensor([[byte]], dtype=torch.uint8), bits).tolist() == values.tolist()


def test_a_row_fills_whole_bytes() -> None:
    fits = {
        name: [get_format(name).fits(3, columns) for columns in (2, 3, 4, 6)] for name in ("int4-quanto", "int2-quanto")
    }
    assert fits == {"int4-quanto": [True, False, True, True], "int2-quanto": [False, False, True, False]}
    assert [get_format("nf4-bnb").fits(*sizes) for sizes in ((1, 64), (2, 32), (3, 32))] == [True, True, False]
    assert get_format("int8-quanto").fits(1, 1)


@pytest.mark.parametrize("bits", [2, 4])
def test_bits_survive_packing(bits: int) -> None:
    values = torch.randint(0, 2**bits, (5, 24), dtype=torch.uint8)
    assert pack_bits(values, bits).shape == (5, 24 * bits // 8)
    assert torch.equal(unpack_bits(pack_bits(values, bits), bits), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROMISED)
def test_a_row_of_zeros_or_of_the_smallest_numbers_stays_finite(name: str, dtype: torch.dtype) -> None:
    """0 divided by a scale of 0 is NaN in float8; 6e-8, the smallest of float16, divided by 448 is 0 there."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[3], weight[5], weight[6], weight[7] = 0.0, 1e-7, 0.0, 0.0
    weight[6, 0] = 6e-8
    weight_format = get_format(name)
    unpacked = weight_format.unpack(weight_format.pack(weight), weight.shape, dtype)
    assert unpacked.isfinite().all()
    assert not unpacked[[3, 7]].any()
    assert (unpacked[5:7] - weight[5:7]).abs().max() <= 1.2e-7


@pytest.mark.parametrize("name", PROMISED)
def test_output_and_gradient_are_those_of_the_unpacked_weight(name: str) -> None:
    plain = layer(torch.float32)
    packed = QuantizedLinear(plain, get_format(name))
    packed.ways = UNPACKED
    x = torch.randn(2, 3, 512)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = packed(ours), nn.functional.linear(theirs, packed.weight, plain.bias)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), ours), torch.autograd.grad(expected.square().sum(), theirs)
    )
    # And that of the plain layer within the error of the format.
    exact = torch.autograd.grad(plain(theirs).square().sum(), theirs)[0]
    found = torch.autograd.grad(packed(ours).square().sum(), ours)[0]
    assert (found - exact).norm() < 1.6 * PROMISED[name][1] * exact.norm()


def test_the_backward_pass_keeps_no_copy_of_weight_or_input() -> None:
    packed = QuantizedLinear(layer(), get_format("int8-quanto"))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        packed(torch.randn(4, 512, dtype=torch.bfloat16, requires_grad=True))
    assert {id(tensor) for tensor in saved} == {id(part) for part in packed.parts.values()}


def test_products_are_those_of_autocast() -> None:
    packed = QuantizedLinear(layer(torch.float32), get_format("int8-quanto"))
    x = torch.randn(4, 512, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = packed(x)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def test_autocast_is_on_in_the_format_of_the_option_and_off_without() -> None:
    device = torch.device("cpu")
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        with autocast(device, name):
            assert torch.is_autocast_enabled("cpu")
            assert torch.get_autocast_dtype("cpu") == dtype
    with autocast(device, "no"):
        assert not torch.is_autocast_enabled("cpu")
    assert DTYPES["no"] == torch.float32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.gate, self.odd = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(63, 64)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(64, 64), nn.ModuleList([Block(), Block()])


def test_only_layers_of_blocks_that_a_format_takes_are_packed() -> None:
    model = quantize(Model(), "int4-quanto", block_classes=("Block",), kept=("*.gate",))
    assert list(quantized_layers(model)) == ["blocks.0.query", "blocks.1.query"]
    assert list(quantized_layers(quantize(Model(), "int8-quanto"))) == [
        "embed", *(f"blocks.{index}.{name}" for index in (0, 1) for name in ("query", "gate", "odd"))
    ]  # fmt: skip


def test_a_model_without_such_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="base_model_precision: int8-quanto finds no layer of Model that it can pack"):
        quantize(Model(), "int8-quanto", block_classes=("Elsewhere",))


@pytest.mark.parametrize("name", ["int9-quanto", "int2-torchao", "nf4", "int8-elsewhere"])
def test_a_name_that_is_no_format_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f'base_model_precision: "{name}" is not a number format'):
        get_format(name)


@pytest.mark.parametrize("name", PROMISED)
def test_what_packing_saves_is_known_from_shapes(name: str) -> None:
    def num_bytes(module: nn.Module) -> int:
        return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))

    plain = num_bytes(Model())
    with torch.device("meta"):
        foreseen = saved_bytes(Model(), name, block_classes=("Block",))
        without_gates = saved_bytes(Model(), name, ("Block",), kept=("*.gate",))
    assert num_bytes(quantize(Model(), name, block_classes=("Block",))) == plain - foreseen
    packed = quantize(Model(), name, block_classes=("Block",), kept=("*.gate",))
    assert num_bytes(packed) == plain - without_gates > plain - foreseen


@pytest.mark.parametrize("name", PROMISED)
def test_every_format_works_on_the_processor(name: str) -> None:
    require_device(NumberFormats(name), torch.device("cpu"), torch.bfloat16)


def test_a_device_that_cannot_is_named_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(self: object, weight: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError("no float8 on this device")

    monkeypatch.setattr("simpletuner.precision.quanto.QuantoBytes.pack", cannot)
    with pytest.raises(ConfigError, match=r"(?s)fp8-quanto does not work on cpu.*no float8.*int8-torchao"):
        require_device(NumberFormats("fp8-quanto"), torch.device("cpu"), torch.bfloat16)


def test_a_packed_layer_trains_nothing_and_the_name_of_a_format_may_ask_for_products_in_8_bits() -> None:
    packed = [QuantizedLinear(layer(), get_format(name)) for name in ("int8-torchao", "int8dq-torchao")]
    assert [each.bias is not None and each.bias.requires_grad for each in packed] == [False, False]
    assert [each.is_in_8_bits for each in packed] == [False, True]


def test_a_format_whose_backward_pass_fails_is_refused_before_a_model_is_loaded(monkeypatch) -> None:
    def fail(self: QuantizedLinear, *given: object) -> Tensor:
        raise NotImplementedError("no such product")

    monkeypatch.setattr(QuantizedLinear, "gradient", fail)
    with pytest.raises(ConfigError, match="int8-quanto does not work on cpu here: no such product"):
        require_device(NumberFormats("int8-quanto"), torch.device("cpu"), torch.float32)


def test_a_model_multiplies_in_8_bits_where_that_is_asked_for() -> None:
    for asked in (False, True):
        model = quantize(Model(), "int8-quanto", block_classes=("Block",), quantizes_activations=asked)
        layers = quantized_layers(model)
        assert [path for path, layer in layers.items() if layer.is_in_8_bits] == [
            path for path in layers if asked and "odd" not in path
        ]


def test_a_gradient_is_of_the_weights_that_computed_though_the_layer_holds_others_by_then() -> None:
    """Buffers of swapped blocks: `functional_call` gives the layer other parts than its own for a while."""
    first, second = (QuantizedLinear(layer(torch.float32, 64, 32), get_format("int8-quanto")) for _ in range(2))
    x = torch.randn(3, 64, requires_grad=True)
    own = {name: buffer.clone() for name, buffer in first.named_buffers()}
    for name, buffer in second.named_buffers():
        buffer.copy_(own[name].flip(0))
    output = torch.func.functional_call(first, dict(second.named_buffers()), x)
    flipped = first.weight.flip(0)
    torch.testing.assert_close(output, x @ flipped.T + first.bias)
    [gradient] = torch.autograd.grad(output[:, 0].sum(), x)
    torch.testing.assert_close(gradient, flipped[0].expand(3, 64))


def test_a_plain_copy_of_a_model_gets_the_weights_that_the_packed_one_computes_with() -> None:
    packed, plain = (nn.Sequential(layer(torch.float32, 64, 32), nn.Linear(32, 32)) for _ in range(2))
    own = plain[1].weight.clone()
    packed[0] = QuantizedLinear(packed[0], get_format("int2-quanto"), path="0")
    assert not torch.equal(plain[0].weight, packed[0].weight)
    copy_unpacked(packed, plain)
    assert torch.equal(plain[0].weight, packed[0].weight)
    assert torch.equal(plain[1].weight, own)


def test_each_text_encoder_has_a_format_of_its_own() -> None:
    formats = NumberFormats(encoders=("int8-quanto", "nf4-bnb"))
    assert [formats.of_encoder(index) for index in range(3)] == ["int8-quanto", "nf4-bnb", "no_change"]


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 2.0**-24), (torch.float32, 2.0**-149)])
def test_a_number_above_the_largest_of_its_group_s_scale_becomes_that_and_spoils_no_neighbor(
    dtype: torch.dtype, least: float
) -> None:
    """Of 20 smallest numbers a fifteenth is rounded to one of them: 20 steps do not fit into four bits, 15 do."""
    weight = torch.zeros(2, 32, dtype=dtype)
    weight[:, 0], weight[:, 1] = 20 * least, 10 * least
    weight_format = get_format("int4-quanto")
    found = weight_format.unpack(weight_format.pack(weight), weight.shape, torch.float32) / least
    assert found[:, :4].tolist() == [[15, 10, 0, 0]] * 2
