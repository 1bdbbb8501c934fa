"""What an adapter does to weights: merged it gives the same output, and its nearest LoRA is as near as it can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from simpletuner.adapters import compress as compress_module
from simpletuner.adapters.compress import compress, rank_that_keeps
from simpletuner.adapters.effect import make_module, weight_change
from simpletuner.adapters.files import apply_weights
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.adapters.merge import merge_into
from simpletuner.adapters.reading import read_adapter
from simpletuner.adapters.weights import ALPHA, DOWN, UP, AdapterWeights, alpha_tensor
from simpletuner.errors import ConfigError, DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import perturb, run_stock

TARGETS = {"apply_preset": {"target_module": ["Attention", "FeedForward", "AdaLayerNorm", "Conv2d"]}}
CONFIGS: dict[str, dict[str, Any]] = {
    "lokr": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 4, "factor": 4, "multiplier": 0.5},
    "loha": {"algo": "loha", "linear_dim": 4, "linear_alpha": 2},
    "decomposed": {"algo": "locon", "linear_dim": 4, "dora_wd": True},
    "glora": {"algo": "glora", "linear_dim": 4, "linear_alpha": 2},
    "diag-oft": {"algo": "diag-oft", "linear_dim": 4, "rescaled": True},
    "boft": {"algo": "boft", "linear_dim": 4},
    "full": {"algo": "full"},
    "ia3": {"algo": "ia3"},
}


def saved(path: Path, lycoris: dict[str, Any]) -> tuple[AdapterWeights, torch.Tensor]:
    denoiser = tiny_omnigen_transformer()
    adapter = attach_lycoris(denoiser, lycoris | TARGETS, OMNIGEN, torch.float32, 1)
    perturb(adapter.trainable_parameters())
    adapter.save(path / "a.safetensors", {})
    with torch.no_grad():
        output = run_stock(denoiser.eval())
    return read_adapter(path / "a.safetensors", OMNIGEN, tiny_omnigen_transformer()), output


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merged_model_draws_what_the_adapter_drew(name: str, tmp_path: Path) -> None:
    weights, output = saved(tmp_path, CONFIGS[name])
    stock = tiny_omnigen_transformer()
    merge_into(stock, weights)
    with torch.no_grad():
        torch.testing.assert_close(run_stock(stock), output, rtol=0, atol=2e-5)
        assert (run_stock(tiny_omnigen_transformer()) - output).abs().max() > 1e-3


def test_a_merged_dora_draws_what_it_drew(tmp_path: Path) -> None:
    denoiser = tiny_omnigen_transformer()
    settings = LoraSettings(rank=4, use_dora=True, targets=("all-linear",))
    adapter = attach_lora(denoiser, settings, OMNIGEN, torch.float32, 1)
    perturb(adapter.trainable_parameters())
    stock = tiny_omnigen_transformer()
    merge_into(stock, adapter.weights())
    with torch.no_grad():
        torch.testing.assert_close(run_stock(stock), run_stock(denoiser.eval()), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 5, 3, stride=2, padding=1), nn.Conv1d(3, 5, 2), nn.Linear(3, 5)],
    ids=lambda m: type(m).__name__,
)
def test_the_change_of_a_layer_is_the_product_that_a_lora_stands_for(layer: nn.Module) -> None:
    kernel = layer.weight.shape[2:]
    lora = {DOWN: torch.randn(2, 3, *kernel), UP: torch.randn(5, 2, *[1] * len(kernel)), "alpha": torch.tensor(1.0)}
    change, bias = weight_change(layer, lora)
    expected = 0.5 * torch.einsum("or,ri->oi", lora[UP].flatten(1), lora[DOWN].flatten(1)).reshape(layer.weight.shape)
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-5)
    assert bias is None


def test_a_lokr_of_full_rank_becomes_a_lora_without_loss_and_of_small_rank_with_the_loss_that_is_reported(
    tmp_path: Path,
) -> None:
    weights, output = saved(tmp_path, CONFIGS["lokr"])
    whole, loss = compress(weights, tiny_omnigen_transformer(), 32)
    assert loss < 1e-5
    generation = tiny_omnigen_transformer()
    apply_weights(generation, whole, OMNIGEN, "a")
    with torch.no_grad():
        torch.testing.assert_close(run_stock(generation), output, rtol=0, atol=1e-4)

    small, loss = compress(weights, tiny_omnigen_transformer(), 2)
    layers = dict(tiny_omnigen_transformer().named_modules())
    singular = [
        torch.linalg.svdvals(weight_change(layers[path], module, 0.5)[0].flatten(1)).square()
        for path, module in weights.modules.items()
    ]
    left, all_of_it = (sum(float(s[first:].sum()) for s in singular) for first in (2, 0))
    assert loss == pytest.approx((left / all_of_it) ** 0.5, rel=1e-4)
    assert small.ranks == {2}


def test_what_a_lora_cannot_hold_is_refused(tmp_path: Path) -> None:
    weights, _ = saved(tmp_path, CONFIGS["full"])
    with pytest.raises(ConfigError, match=r"--rank: .*: the adapter changes a bias"):
        compress(weights, tiny_omnigen_transformer(), 4)


def test_a_module_that_is_read_off_is_the_one_that_draws() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    module = make_module(layer, {"diff": torch.ones(4, 4), "diff_b": torch.ones(4)}, 0.5)
    x = torch.randn(2, 4)
    torch.testing.assert_close(module(x), layer(x) + 0.5 * (x.sum(1, keepdim=True) + 1))


def test_a_layer_of_more_inputs_than_are_read_at_once_is_read_to_its_end() -> None:
    layer = nn.Linear(1030, 2)
    row = torch.arange(1030.0).repeat(2, 1)
    change, bias = weight_change(layer, {"diff": row, "diff_b": torch.tensor([1.0, -1.0])}, 0.5)
    torch.testing.assert_close(change, 0.5 * row, rtol=0, atol=1e-4)
    torch.testing.assert_close(bias, torch.tensor([0.5, -0.5]), rtol=0, atol=1e-4)


def test_a_normalization_changes_by_its_own_tensors_times_the_multiplier() -> None:
    module = {"w_norm": torch.tensor([1.0, 2.0]), "b_norm": torch.tensor([3.0, 5.0])}
    change, bias = weight_change(nn.LayerNorm(2), module, 0.5)
    assert (change.tolist(), bias.tolist()) == ([0.5, 1.0], [1.5, 2.5])  # type: ignore[union-attr]
    assert weight_change(nn.RMSNorm(2), {"w_norm": module["w_norm"]}, 0.5)[1] is None


@pytest.mark.parametrize("lycoris", [{"algo": "lokr", "linear_dim": 10000, "factor": 4}, CONFIGS["loha"]], ids=str)
def test_the_rank_that_keeps_a_share_is_the_smallest_that_does(lycoris: dict[str, Any], tmp_path: Path) -> None:
    weights, _ = saved(tmp_path, lycoris)
    rank = rank_that_keeps(weights, tiny_omnigen_transformer(), 0.9)
    assert compress(weights, tiny_omnigen_transformer(), rank)[1] <= 0.1
    assert compress(weights, tiny_omnigen_transformer(), rank - 1)[1] > 0.1


def test_a_merge_is_computed_in_float32_and_rounded_once_with_strength_and_multiplier() -> None:
    """Steps of bfloat16 above 1 are 2^-7. A change of half a step rounds to even, which is 1; one that is a little more
    than half rounds up, though bfloat16 would take it for just half.
    """
    layer = nn.Linear(1, 2, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    model = nn.ModuleDict({"a": layer})
    lora = {UP: 4 * torch.tensor([[2.0**-8], [2.0**-8 + 2.0**-17]]), DOWN: torch.ones(1, 1), ALPHA: alpha_tensor(1)}
    merge_into(model, AdapterWeights({"a": lora}, lycoris={"multiplier": 0.5}), strength=0.5)
    assert layer.weight.flatten().tolist() == [1.0, 1 + 2**-7]
    wide = nn.ModuleDict({"a": nn.Linear(1, 2, bias=False)})
    with torch.no_grad():
        wide["a"].weight.zero_()
    merge_into(wide, AdapterWeights({"a": lora}, lycoris={"multiplier": 0.5}), strength=0.5)
    assert wide["a"].weight.flatten().tolist() == [2**-8, 2**-8 + 2**-17]


def test_a_convolution_with_stride_padding_and_dilation_changes_by_what_is_written() -> None:
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=2)
    difference = torch.arange(54.0).reshape(3, 2, 3, 3)
    change, bias = weight_change(layer, {"diff": difference, "diff_b": torch.tensor([1.0, 2.0, 3.0])}, 0.5)
    torch.testing.assert_close(change, 0.5 * difference, rtol=0, atol=1e-4)
    torch.testing.assert_close(bias, torch.tensor([0.5, 1.0, 1.5]), rtol=0, atol=1e-5)
    with pytest.raises(DataError, match="in groups"):
        weight_change(nn.Conv2d(2, 2, 3, groups=2), {"diff": torch.ones(2, 1, 3, 3)})


@pytest.mark.parametrize("on_input", [False, True])
def test_scaled_rows_or_inputs_change_the_weight_by_their_share_of_it(on_input: bool) -> None:
    layer = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    module = {"weight": torch.tensor([[1.0], [10.0]]), "on_input": torch.tensor(on_input)}
    module["weight"] = module["weight"].reshape(1, 2) if on_input else module["weight"]
    change, _ = weight_change(layer, module, 0.5)
    assert change.tolist() == ([[0.5, 10], [1.5, 20]] if on_input else [[0.5, 1], [15, 20]])


def test_a_change_in_half_precision_is_multiplied_out_in_float32() -> None:
    lora = {UP: torch.tensor([[1 + 2**-7]]).bfloat16(), DOWN: torch.tensor([[1 + 2**-7]]).bfloat16()}
    change, _ = weight_change(nn.Linear(1, 1).to(torch.bfloat16), lora)
    assert change.tolist() == [[(1 + 2**-7) ** 2]]


def diagonal(*values: float) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """A layer, and a LoRA whose singular values these are."""
    size = len(values)
    module = {UP: torch.diag(torch.tensor(values)), DOWN: torch.eye(size), ALPHA: alpha_tensor(size)}
    return nn.Linear(size, size), module


def test_a_change_is_computed_where_that_is_asked_for_else_where_its_layer_is() -> None:
    """Of modules on the CPU; `meta` stands for an accelerator."""
    norm, module = nn.LayerNorm(2), {"w_norm": torch.ones(2)}
    assert weight_change(norm, module, device=torch.device("meta"))[0].device.type == "meta"
    assert weight_change(norm, module)[0].device.type == "cpu"
    assert weight_change(norm.to("meta"), module)[0].device.type == "meta"


@pytest.mark.parametrize("side", [1024, 1])
def test_the_lost_part_is_counted_by_hand(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Singular values 6, 3, 2: of rank 1 it leaves 9 + 4 of 49; a LoRA that is kept as it is adds to the whole. A
    multiplier changes them all.
    """
    monkeypatch.setattr("simpletuner.adapters.compress.FULL_SVD_SIDE", side)
    (layer, module), (kept_layer, kept) = diagonal(6.0, 3.0, 2.0), diagonal(4.0)
    model = nn.ModuleDict({"a": layer, "b": kept_layer})
    weights = AdapterWeights({"a": module, "b": kept}, {"ss_network_dim": "3", "modelspec.title": "x", "mine": "y"})
    small, loss = compress(weights, model, 1)
    assert loss == pytest.approx((13 / (49 + 16)) ** 0.5, rel=1e-5)
    assert small.modules["b"] == kept
    assert small.metadata == {"mine": "y"}
    product = small.modules["a"][UP] @ small.modules["a"][DOWN]
    torch.testing.assert_close(product, torch.diag(torch.tensor([6.0, 0, 0])), rtol=0, atol=1e-4)
    doubled, loss = compress(replace(weights, lycoris={"multiplier": 2.0}), model, 1)
    assert loss == pytest.approx((13 / (49 + 16)) ** 0.5, rel=1e-5)
    torch.testing.assert_close(doubled.modules["b"][UP] @ doubled.modules["b"][DOWN], torch.tensor([[8.0]]))
    assert (doubled.multiplier, doubled.ranks) == (1, {1})


def test_a_smaller_lora_has_the_format_of_the_larger_one() -> None:
    layer, module = diagonal(6.0, 3.0)
    half = {name: tensor.bfloat16() if name != ALPHA else tensor for name, tensor in module.items()}
    assert compress(AdapterWeights({"a": half}), nn.ModuleDict({"a": layer}), 1)[0].dtype == torch.bfloat16


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.6, 2), (0.8, 3), (1.0, 3)])
def test_ranks_are_counted_in_the_energy_that_they_leave_out(share: float, rank: int) -> None:
    """Singular values 4, 2, 1: ranks 0 to 3 leave 21, 5, 1 and 0 of 21; a share of 0.6 leaves at most 0.16 * 21."""
    layer, module = diagonal(4.0, 2.0, 1.0)
    assert rank_that_keeps(AdapterWeights({"a": module}), nn.ModuleDict({"a": layer}), share) == rank
    nothing = {**module, UP: torch.zeros(3, 3)}
    assert rank_that_keeps(AdapterWeights({"a": nothing}), nn.ModuleDict({"a": layer}), share) == 1


def test_a_kronecker_product_on_a_layer_in_half_precision_is_multiplied_out_in_float32() -> None:
    """Beside a weight of 256, where steps of bfloat16 are 2."""
    layer = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(256.0)
    first, second = torch.tensor([[0.5, 0.25], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [3.0, 0.125]])
    change, _ = weight_change(layer, {"lokr_w1": first, "lokr_w2": second, ALPHA: alpha_tensor(1)})
    torch.testing.assert_close(change, torch.kron(first, second), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("share", "rank"), [(0.7, 1), (0.8, 2)])
def test_of_kinds_of_modules_each_counts_with_the_energy_of_its_change(share: float, rank: int) -> None:
    """A Kronecker product with the singular values 2 and 1, a LoRA with one of 4: rank 1 leaves 1 of 21."""
    lora_layer, lora = diagonal(4.0)
    lokr = {"lokr_w1": torch.eye(1), "lokr_w2": torch.diag(torch.tensor([2.0, 1.0])), ALPHA: alpha_tensor(1)}
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": lora_layer})
    weights = AdapterWeights({"a": lokr, "b": lora}, lycoris={"multiplier": 0.5})
    assert rank_that_keeps(weights, model, share) == rank


@pytest.mark.parametrize(("limit", "is_whole"), [(4, True), (3, False)])
def test_the_smaller_side_decides_whether_all_singular_values_are_computed(
    limit: int, is_whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Diagonal (5, 3, 2, 1) beside two columns of zeros: of rank 2 the LoRA is its first two entries."""
    change = torch.zeros(4, 6)
    change[range(4), range(4)] = torch.tensor([5.0, 3.0, 2.0, 1.0])
    taken: list[int] = []
    lowrank = torch.svd_lowrank
    monkeypatch.setattr(compress_module, "FULL_SVD_SIDE", limit)
    monkeypatch.setattr(torch, "svd_lowrank", lambda matrix, q, niter: taken.append(q) or lowrank(matrix, q, niter))
    found = compress_module._nearest(change, 2, torch.float32)
    assert taken == ([] if is_whole else [4])  # 16 more than the rank, and no more than the matrix has
    expected = torch.zeros(4, 6)
    expected[0, 0], expected[1, 1] = 5.0, 3.0
    torch.testing.assert_close(found[UP] @ found[DOWN], expected)
    assert found[ALPHA] == 2
    # The root of each singular value stands on both sides.
    torch.testing.assert_close(found[UP].norm(dim=0).square(), torch.tensor([5.0, 3.0]))
    torch.testing.assert_close(found[DOWN].norm(dim=1).square(), torch.tensor([5.0, 3.0]))


def test_tensors_of_no_algorithm_are_refused_by_their_names() -> None:
    with pytest.raises(DataError, match="LyCORIS has no module with else, something"):
        weight_change(nn.Linear(2, 2), {"something": torch.ones(2), "else": torch.ones(2)})
