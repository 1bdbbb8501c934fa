"""Arithmetic on the weights of an adapter, against literal tensors."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from simpletuner.adapters.formats import modules_in_file, peft_metadata, with_multiplier_in_weights
from simpletuner.adapters.weights import (
    ALPHA,
    DORA,
    DOWN,
    UP,
    AdapterWeights,
    algorithm_of,
    alpha_tensor,
    fuse_loras,
    is_whole_lokr,
    row_norms,
    scale_of,
    scaled,
    split_lora,
    swap_halves,
    with_unit_scale,
)
from simpletuner.errors import ConfigError
from simpletuner.families.registry import get_spec
from simpletuner.models.omnigen.spec import OMNIGEN


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


ONE = matrix([1.0])
PLAIN = {UP: ONE, DOWN: ONE}


def change(lora) -> torch.Tensor:
    """What a LoRA adds to its layer, in float64."""
    return scale_of(lora) * (lora[UP].double() @ lora[DOWN].double())


def test_a_scale_that_half_precision_cannot_hold_is_put_into_float32():
    """alpha 3 of rank 7: 3/7 of each entry, within the error of float32 and not of bfloat16's 8 bits."""
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn(shape, generator=generator).bfloat16() for shape in ((7, 5), (6, 7)))
    unit = with_unit_scale({DOWN: down, UP: up, ALPHA: alpha_tensor(3)})
    assert unit[UP].dtype == torch.float32
    torch.testing.assert_close(unit[UP].double(), up.double() * 3 / 7, rtol=1e-6, atol=0)
    assert float(unit[ALPHA]) == 7
    assert torch.equal(unit[DOWN], down)


@pytest.mark.parametrize(("alpha", "factor"), [(8.0, 2.0), (2.0, 0.5), (4.0, 1.0)])
def test_a_power_of_two_stays_in_half_precision(alpha, factor):
    up = matrix([1.0, 2.0, 3.0, 4.0]).bfloat16()
    unit = with_unit_scale({DOWN: torch.ones(4, 2).bfloat16(), UP: up, ALPHA: alpha_tensor(alpha)})
    assert unit[UP].dtype == torch.bfloat16
    assert unit[UP].tolist() == [[factor * value for value in (1.0, 2.0, 3.0, 4.0)]]


def test_halves_are_swapped_in_the_rows_of_up_and_of_the_norms():
    """[a; b] is written [b; a]; down has no rows of the layer."""
    lora = {
        UP: matrix([1.0], [2.0], [3.0], [4.0]),
        DOWN: matrix([5.0, 6.0]),
        DORA: matrix([7.0], [8.0], [9.0], [10.0]),
        ALPHA: alpha_tensor(1),
    }
    swapped = swap_halves(lora)
    assert swapped[UP].tolist() == [[3], [4], [1], [2]]
    assert swapped[DORA].tolist() == [[9], [10], [7], [8]]
    assert swapped[DOWN].tolist() == [[5, 6]]
    assert lora[UP].tolist() == [[1], [2], [3], [4]]


def test_several_layers_become_one_block_by_block():
    """Rows 2 + 1 + 2, the second layer without a LoRA; ranks 1 and 2, scales 1 and 0.5."""
    first = {UP: matrix([1.0], [2.0]), DOWN: matrix([3.0, 4.0]), ALPHA: alpha_tensor(1)}
    third = {UP: matrix([1.0, 2.0], [3.0, 4.0]), DOWN: matrix([1.0, 0.0], [0.0, 1.0]), ALPHA: alpha_tensor(1)}
    fused = fuse_loras([(2, first), (1, {}), (2, third)])
    assert fused[DOWN].tolist() == [[3, 4], [1, 0], [0, 1]]
    assert change(fused).tolist() == [[3, 4], [6, 8], [0, 0], [0.5, 1], [1.5, 2]]
    assert float(fused[ALPHA]) == 3


def test_layers_of_one_scale_keep_it():
    lora = {UP: matrix([1.0]), DOWN: matrix([2.0, 2.0]), ALPHA: alpha_tensor(0.25)}
    fused = fuse_loras([(1, lora), (1, lora)])
    assert float(fused[ALPHA]) == 0.5
    assert fused[UP].tolist() == [[1, 0], [0, 1]]
    assert change(fused).tolist() == [[0.5, 0.5], [0.5, 0.5]]


def test_a_joined_matrix_falls_apart_into_the_layers_that_it_was_made_of():
    first = {UP: matrix([1.0], [2.0]), DOWN: matrix([3.0, 4.0]), ALPHA: alpha_tensor(0.5)}
    second = {UP: matrix([5.0, 6.0]), DOWN: matrix([1.0, 0.0], [0.0, 1.0]), ALPHA: alpha_tensor(1)}
    pieces = split_lora(fuse_loras([(2, first), (1, second)]), [2, 1])
    assert [piece[UP].tolist() for piece in pieces] == [[[1], [2]], [[5, 6]]]
    assert [piece[DOWN].tolist() for piece in pieces] == [[[3, 4]], [[1, 0], [0, 1]]]
    assert [float(piece[ALPHA]) for piece in pieces] == [0.5, 1]


def test_norms_are_the_lengths_of_rows_whatever_the_dimensions():
    assert row_norms(matrix([3.0, 4.0], [6.0, 8.0])).tolist() == [[5], [10]]
    assert row_norms(torch.ones(2, 1, 2, 2)).shape == (2, 1, 1, 1)
    assert row_norms(torch.ones(2, 1, 2, 2)).flatten().tolist() == [2, 2]


def test_a_lora_without_alpha_is_not_scaled_and_one_with_it_is():
    assert scale_of({DOWN: torch.ones(4, 2)}) == 1
    assert scale_of({DOWN: torch.ones(4, 2), ALPHA: alpha_tensor(2)}) == 0.5
    assert float(alpha_tensor(10000)) == 10000


def test_algorithms_are_reported_by_their_tensors():
    modules = {"a": {UP: torch.ones(1)}, "b": {"lokr_w1_a": torch.ones(1)}, "c": {"dora_scale": torch.ones(1)}}
    assert [algorithm_of(module) for module in modules.values()] == ["lora", "lokr", "unknown"]
    assert AdapterWeights(modules).algorithms == ["lokr", "lora", "unknown"]
    assert AdapterWeights(modules, lycoris={"multiplier": "0.5"}).multiplier == 0.5
    assert not AdapterWeights(modules).is_plain_lora
    assert not AdapterWeights({"a": {UP: torch.ones(1), "lora_mid.weight": torch.ones(1)}}).is_plain_lora


@pytest.mark.parametrize(
    ("module", "changed"),
    [
        ({UP: matrix([1.0]), DOWN: matrix([1.0]), ALPHA: alpha_tensor(1)}, {UP: matrix([3.0])}),
        ({"lokr_w1": matrix([1.0]), "lokr_w2": matrix([2.0])}, {"lokr_w1": matrix([3.0])}),
        ({"lokr_w1_a": matrix([1.0]), "lokr_w1_b": matrix([2.0])}, {"lokr_w1_a": matrix([3.0])}),
        ({"hada_w1_a": matrix([1.0]), "hada_w2_a": matrix([2.0])}, {"hada_w1_a": matrix([3.0])}),
        ({"diff": matrix([1.0]), "diff_b": matrix([2.0])}, {"diff": matrix([3.0]), "diff_b": matrix([6.0])}),
        ({"w_norm": matrix([1.0])}, {"w_norm": matrix([3.0])}),
        (
            {"a1.weight": matrix([1.0]), "b1.weight": matrix([2.0]), "a2.weight": matrix([4.0])},
            {"a1.weight": matrix([3.0]), "b1.weight": matrix([6.0])},
        ),
        ({"on_input": matrix([1.0]), "weight": matrix([2.0])}, {"weight": matrix([6.0])}),
    ],
    ids=str,
)
def test_three_times_the_change_is_three_times_one_factor_of_it(module, changed):
    assert scaled(module, 3.0) == {**module, **changed}
    assert scaled(module, 1) == module


def test_a_change_that_is_no_multiple_of_a_weight_is_not_scaled():
    decomposed = {UP: matrix([1.0]), DOWN: matrix([1.0]), DORA: matrix([1.0])}
    assert scaled(decomposed, 3.0) is None
    assert scaled({"oft_blocks": matrix([1.0])}, 3.0) is None
    assert scaled(decomposed, 1) == decomposed


def test_a_multiplier_goes_into_the_weights_or_is_refused_with_what_has_none():
    weights = AdapterWeights({"a": PLAIN, "b": {"lokr_w1": matrix([2.0])}}, lycoris={"multiplier": 3.0, "algo": "x"})
    found = with_multiplier_in_weights(weights)
    assert found.modules["a"][UP].tolist() == [[3.0]]
    assert found.modules["a"][DOWN].tolist() == [[1.0]]
    assert found.modules["b"]["lokr_w1"].tolist() == [[6.0]]
    assert found.lycoris == {"multiplier": 1.0, "algo": "x"}
    assert with_multiplier_in_weights(found) is found
    for module, kind in ((PLAIN | {DORA: matrix([1.0])}, "weight decomposition"), ({"oft_blocks": ONE}, "oft")):
        message = rf"multiplier: the multiplier 3 cannot be put into the weights of {kind} \(c\)"
        with pytest.raises(ConfigError, match=message):
            with_multiplier_in_weights(AdapterWeights({"c": module}, lycoris={"multiplier": 3}))


def test_diffsynth_files_hold_plain_lora_of_families_that_it_has():
    flux, layer = get_spec("flux"), {"transformer_blocks.0.attn.to_q": PLAIN}
    for spec, modules, message in (
        (OMNIGEN, layer, "format: DiffSynth-Studio has no OmniGen"),
        (flux, {"a": {"lokr_w1": ONE}}, "format: diffsynth files hold plain LoRA without weight decomposition"),
        (flux, {"a": PLAIN | {DORA: ONE}}, "format: diffsynth files hold plain LoRA without weight decomposition"),
    ):
        with pytest.raises(ConfigError, match=message):
            modules_in_file(AdapterWeights(modules), spec, "diffsynth", torch.nn.Module())


def test_a_lokr_is_whole_where_neither_factor_is_of_low_rank():
    first, second = matrix([1.0]), matrix([2.0])
    assert is_whole_lokr({"lokr_w1": first, "lokr_w2": second})
    assert not is_whole_lokr({"lokr_w1": first, "lokr_w2_a": second, "lokr_w2_b": second})
    assert not is_whole_lokr({"lokr_w1_a": first, "lokr_w1_b": first, "lokr_w2": second})


def test_only_ranks_that_differ_are_exceptions_for_peft():
    def lora(rank: int) -> dict[str, torch.Tensor]:
        return {UP: torch.ones(3, rank), DOWN: torch.ones(rank, 3), ALPHA: alpha_tensor(rank)}

    weights = AdapterWeights({"a.q": lora(4), "a.k": lora(4), "b.q": lora(2)})
    metadata = peft_metadata(weights, OMNIGEN)
    assert list(metadata) == ["lora_adapter_metadata"]
    assert json.loads(metadata["lora_adapter_metadata"]) == {
        "transformer.r": 4,
        "transformer.lora_alpha": 4,
        "transformer.rank_pattern": {"^b.q": 2},
        "transformer.alpha_pattern": {"^b.q": 2},
        "transformer.target_modules": ["a.k", "a.q", "b.q"],
        "transformer.use_dora": False,
        "transformer.lora_bias": False,
    }
    decomposed = AdapterWeights({"a.q": lora(4), "b.q": lora(4) | {DORA: torch.ones(3, 1)}})
    found = json.loads(peft_metadata(decomposed, OMNIGEN)["lora_adapter_metadata"])
    assert (found["transformer.use_dora"], found["transformer.rank_pattern"]) == (True, {})


@pytest.mark.parametrize(
    ("modules", "kind"),
    [
        ([PLAIN], "lora"),
        ([PLAIN, PLAIN | {DORA: matrix([1.0])}], "dora"),
        ([{"lokr_w1": matrix([1.0])}, {"lokr_w1_a": matrix([1.0])}], "lokr"),
        ([{"lokr_w1": matrix([1.0]), DORA: matrix([1.0])}], "other"),
        ([{"hada_w1_a": matrix([1.0])}], "loha"),
        ([{"hada_w1_a": matrix([1.0])}, PLAIN], "other"),
        ([{"diff": matrix([1.0])}], "other"),
    ],
    ids=str,
)
def test_readers_are_told_the_one_kind_that_all_layers_have(modules, kind: str):
    assert AdapterWeights(dict(enumerate(modules))).kind == kind


def test_the_format_of_a_file_is_that_of_its_weights_and_not_of_alpha():
    half = {ALPHA: alpha_tensor(1), "on_input": torch.tensor(True), "weight": matrix([1.0]).bfloat16()}
    assert AdapterWeights({"a": half}).dtype == torch.bfloat16
    assert AdapterWeights({"a": half, "b": PLAIN | {DOWN: torch.ones(3, 1)}}).ranks == {3}


def test_joined_layers_of_two_formats_keep_the_wider_one_and_their_norms():
    narrow = {UP: matrix([1.0]).bfloat16(), DOWN: matrix([1.0]).bfloat16(), DORA: matrix([2.0])}
    wide = {UP: matrix([1 + 2**-12]), DOWN: matrix([1.0]), DORA: matrix([3.0])}
    fused = fuse_loras([(1, narrow), (1, wide)])
    assert fused[UP].tolist() == [[1, 0], [0, 1 + 2**-12]]
    assert fuse_loras([(1, narrow), (2, narrow | {UP: matrix([1.0], [2.0]).bfloat16()})])[UP].dtype == torch.bfloat16
    assert fused[DORA].tolist() == [[2], [3]]
    assert [piece[DORA].tolist() for piece in split_lora(fused, [1, 1])] == [[[2]], [[3]]]
    with pytest.raises(
        ConfigError, match="format: of layers that are one matrix some are weight-decomposed and others are not"
    ):
        fuse_loras([(1, narrow), (1, PLAIN)])


def test_convolutions_are_joined_and_taken_apart_along_their_channels():
    """`up` of a convolution is (out, rank, 1, 1), `down` has the kernel."""
    first = {UP: torch.ones(2, 1, 1, 1), DOWN: torch.full((1, 3, 2, 2), 5.0)}
    second = {UP: torch.full((1, 2, 1, 1), 7.0), DOWN: torch.full((2, 3, 2, 2), 6.0)}
    fused = fuse_loras([(2, first), (1, second)])
    assert (fused[UP].shape, fused[DOWN].shape) == ((3, 3, 1, 1), (3, 3, 2, 2))
    assert fused[UP][:, :, 0, 0].tolist() == [[1, 0, 0], [1, 0, 0], [0, 7, 7]]
    pieces = split_lora(fused, [2, 1])
    assert [piece[DOWN][:, 0, 0, 0].tolist() for piece in pieces] == [[5], [6, 6]]


def test_a_layer_that_a_joined_lora_does_not_touch_gets_one_rank_of_zeros():
    fused = fuse_loras([(1, {}), (1, PLAIN | {ALPHA: alpha_tensor(0.5)})])
    untouched, touched = split_lora(fused, [1, 1])
    assert (untouched[UP].tolist(), float(untouched[ALPHA])) == ([[0]], 0.5)
    assert (touched[UP].tolist(), float(touched[ALPHA])) == ([[1]], 0.5)


def test_norms_of_half_precision_are_measured_in_float32():
    """0.1 is 0.10009765625 in bfloat16, whose sum of 300 squares would be rounded to 8 bits."""
    assert row_norms(torch.full((1, 300), 0.1).bfloat16()).item() == pytest.approx(0.10009765625 * 300**0.5, rel=1e-6)


def test_readers_that_know_no_alpha_get_a_lora_of_scale_one():
    """Rank 1 with alpha 3: `up` takes the 3, and there is no alpha. The other form of the family keeps it."""
    spec = replace(OMNIGEN, keys=replace(OMNIGEN.keys, own_names=("comfyui", "kohya"), without_alpha=("comfyui",)))
    weights = AdapterWeights({"a": PLAIN | {ALPHA: torch.tensor(3.0)}, "b": {"lokr_w1": ONE}})
    found = modules_in_file(weights, spec, "comfyui", torch.nn.Module())
    assert {name: value.tolist() for name, value in found["a"].items()} == {UP: [[3.0]], DOWN: [[1.0]]}
    assert found["b"] == {"lokr_w1": ONE}
    kept = modules_in_file(weights, spec, "kohya", torch.nn.Module())["a"]
    assert {name: value.tolist() for name, value in kept.items()} == {UP: [[1.0]], DOWN: [[1.0]], ALPHA: 3.0}


@pytest.mark.parametrize(("written", "expected"), [((5, 1), (5,)), ((5, 1, 1, 1), (1, 5, 1, 1))])
def test_magnitudes_have_the_shape_that_peft_gives_them(written, expected):
    module = PLAIN | {DORA: torch.ones(written)}
    found = modules_in_file(AdapterWeights({"a": module}), OMNIGEN, "diffusers", torch.nn.Module())["a"]
    assert tuple(found[DORA].shape) == expected
