"""What is corrected in LyCORIS' modules: the base stays, draws can be repeated, other ways to compute are equal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lycoris.modules.dylora import DyLoraModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.loha import LohaModule
from torch import nn

from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.adapters.lycoris_full import FullDifference
from simpletuner.adapters.lycoris_modules import prepare_module, rotations
from simpletuner.adapters.lycoris_start import start_module
from simpletuner.errors import ConfigError, DataError
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import base_state_dict, perturb, run_stock

TARGETS = {"apply_preset": {"target_module": ["Attention", "FeedForward"]}}
ALGORITHMS = ("lokr", "loha", "locon", "glora", "diag-oft", "boft", "full", "dylora", "ia3")


def attach(**lycoris: Any):
    denoiser = tiny_omnigen_transformer()
    return denoiser, attach_lycoris(denoiser, {"linear_dim": 4} | TARGETS | lycoris, OMNIGEN, torch.float32, 1)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_the_base_stays_whole_under_every_algorithm(algo: str) -> None:
    stock = tiny_omnigen_transformer()
    denoiser, adapter = attach(algo=algo)
    torch.testing.assert_close(run_stock(denoiser), run_stock(stock), rtol=0, atol=1e-6)
    perturb(adapter.trainable_parameters())
    assert (run_stock(denoiser) - run_stock(stock)).abs().max() > 1e-3
    with adapter.disabled():
        assert torch.equal(run_stock(denoiser), run_stock(stock))
    base = base_state_dict(denoiser)
    assert all(torch.equal(base[name], tensor) for name, tensor in stock.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_learns(algo: str) -> None:
    """The loss against the output of other weights falls, and the base gets no gradient."""
    denoiser, adapter = attach(algo=algo)
    target = run_stock(tiny_omnigen_transformer(seed=7)).detach()
    optimizer = torch.optim.Adam(adapter.trainable_parameters().values(), lr=2e-2)
    losses = []
    for step in range(40):
        torch.manual_seed(step)
        loss = (run_stock(denoiser) - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert not any(p.requires_grad for name, p in denoiser.named_parameters() if not name.startswith("adapter."))


def test_dylora_draws_a_rank_in_training_from_the_generator_that_is_reseeded() -> None:
    denoiser, adapter = attach(algo="dylora", linear_dim=8, block_size=2)
    perturb(adapter.trainable_parameters())
    denoiser.train()
    outputs = []
    for seed in (0, 0, 1, 2):
        torch.manual_seed(seed)
        outputs.append(run_stock(denoiser).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2]) or not torch.equal(outputs[0], outputs[3])
    denoiser.eval()
    assert torch.equal(run_stock(denoiser), run_stock(denoiser))


@pytest.mark.parametrize("settings", [{}, {"rescaled": True}], ids=str)
@pytest.mark.parametrize("algo", ["diag-oft", "boft"])
def test_a_rotation_of_another_strength_is_that_of_the_merged_weight(algo: str, settings) -> None:
    outputs = []
    for bypass_mode in (True, False):
        denoiser, adapter = attach(algo=algo, bypass_mode=bypass_mode, **settings)
        perturb(adapter.trainable_parameters())
        with adapter.scaled(0.5):
            outputs.append(run_stock(denoiser.eval()))
    torch.testing.assert_close(*outputs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(6, 4, 3, padding=1)])
def test_scaling_rows_or_inputs_is_equal_to_the_scaled_weight(make, on_input: bool) -> None:
    torch.manual_seed(0)
    layer = make()
    x = torch.randn(2, 6, 5, 5) if isinstance(layer, nn.Conv2d) else torch.randn(2, 3, 6)
    module = IA3Module("ia3", layer, 0.5, train_on_input=on_input)
    nn.init.normal_(module.weight)
    expected = module(x)
    prepare_module(module)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5)


def test_a_norm_that_lycoris_cannot_train_is_refused_and_one_that_it_can_is_trained() -> None:
    class Net(nn.Module):
        def __init__(self, norm: nn.Module):
            super().__init__()
            self.norm, self.proj = norm, nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.proj(self.norm(x))

    from dataclasses import replace

    from simpletuner.families.spec import AdaptableModule

    spec = replace(OMNIGEN, adaptable=(AdaptableModule("LayerNorm", ("norm",)), AdaptableModule("Linear", ("proj",))))
    lycoris = {"algo": "locon", "linear_dim": 2, "train_norm": True}
    net = Net(nn.LayerNorm(8))
    adapter = attach_lycoris(net, lycoris, spec, torch.float32, 1)
    assert {match.entry: match.modules for match in adapter.report} == {"Linear": 1, "LayerNorm": 1}
    assert {"lycoris_norm.w_norm", "lycoris_norm.b_norm"} < set(adapter.trainable_parameters())
    x = torch.randn(2, 8)
    before = net(x)
    perturb(adapter.trainable_parameters())
    assert not torch.equal(net(x), before)
    with adapter.disabled():
        assert torch.equal(net(x), before)
    with pytest.raises(ConfigError, match=r"train_norm: .*LyCORIS knows no other"):
        attach_lycoris(Net(nn.LayerNorm(8, elementwise_affine=False)), lycoris, spec, torch.float32, 1)


@pytest.mark.parametrize(
    ("preset", "modules"), [("attn-only", 8), ("attn-mlp", 12), ("unet-transformer-only", 12), ("full-lin", 18)]
)
def test_presets_mean_the_layers_of_the_family(preset: str, modules: int) -> None:
    denoiser = tiny_omnigen_transformer()
    lycoris = {"algo": "locon", "linear_dim": 2, "preset": preset}
    adapter = attach_lycoris(denoiser, lycoris, OMNIGEN, torch.float32, 1)
    assert sum(match.modules for match in adapter.report) == len(adapter.network.loras)
    assert len(adapter.network.loras) == modules


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_algorithm_can_be_counted_on_a_model_without_values(algo: str) -> None:
    denoiser = tiny_omnigen_transformer().to("meta")
    adapter = attach_lycoris(denoiser, {"algo": algo, "linear_dim": 4} | TARGETS, OMNIGEN, torch.float32, 1)
    real = attach(algo=algo)[1].trainable_parameters()
    counted = adapter.trainable_parameters()
    assert {name: p.shape for name, p in counted.items()} == {name: p.shape for name, p in real.items()}


@pytest.mark.parametrize("constraint", [0, 0.05, 50.0])
def test_rotations_are_those_of_lycoris(constraint: float) -> None:
    """Whose function asks the device for values; this one does not."""
    blocks = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    q = blocks - blocks.transpose(1, 2)
    if constraint and q.norm() > constraint:
        q = q * constraint / q.norm()
    expected = (torch.eye(4) + q) @ (torch.eye(4) - q).inverse()
    torch.testing.assert_close(rotations(blocks, torch.eye(4), constraint), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(expected @ expected.mT, torch.eye(4).expand(3, 4, 4), rtol=0, atol=1e-4)


def fixed_draws(monkeypatch: pytest.MonkeyPatch, *draws: float) -> None:
    """`torch.rand` gives these numbers, as many as it is asked for."""
    monkeypatch.setattr(torch, "rand", lambda size: torch.tensor(draws[:size]))


def with_matrix(**settings: Any) -> tuple[nn.Linear, FullDifference]:
    """A layer that gives its bias (10, 20), and D = ((1, 2), (3, 4)) with a bias of (1, 1) beside it, twice."""
    layer = nn.Linear(2, 2)
    layer.weight.data.zero_()
    layer.bias.data = torch.tensor([10.0, 20.0])
    module = FullDifference("full", layer, 2.0, **settings)
    assert module.bias is not None
    module.weight.data, module.bias.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.ones(2)
    module.apply_to()
    return layer, module


ONES = torch.ones(1, 2)


def test_a_whole_matrix_starts_with_that_of_a_file_and_one_of_another_size_is_refused() -> None:
    _, module = with_matrix()
    diff, bias = torch.tensor([[9.0, 8.0], [7.0, 6.0]]), torch.tensor([5.0, 4.0])
    with torch.no_grad():
        start_module(module, {"diff": diff, "diff_b": bias, "alpha": torch.tensor(1.0)}, "a.b", "file")
    assert module.bias is not None
    assert (module.weight.tolist(), module.bias.tolist()) == (diff.tolist(), bias.tolist())
    message = "file: init_lora: a.b is full with bias 2, weight 3x2; here it has bias 2, weight 2x2"
    with pytest.raises(DataError, match=message):
        start_module(module, {"diff": torch.ones(3, 2), "diff_b": bias}, "a.b", "file")


def test_alpha_of_a_file_counts_where_it_scales_the_change() -> None:
    module = LohaModule("loha", nn.Linear(2, 2, bias=False), lora_dim=1, alpha=2)
    tensors = {name: torch.full(p.shape, 3.0) for name, p in module.named_parameters()}
    with torch.no_grad():
        start_module(module, {**tensors, "alpha": torch.tensor(2.0)}, "a", "file")
        assert all((parameter == 3).all() for parameter in module.parameters())
        message = "file: init_lora: a has alpha 4 there and 2 here"
        with pytest.raises(DataError, match=message):
            start_module(module, {**tensors, "alpha": torch.tensor(4.0)}, "a", "file")


def test_a_whole_matrix_and_its_bias_are_added_as_often_as_the_multiplier_says(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, module = with_matrix(module_dropout=0.5, rank_dropout=0.5)
    fixed_draws(monkeypatch, 0.0, 0.0)
    module.eval()
    assert layer(ONES).tolist() == [[10 + 2 * (3 + 1), 20 + 2 * (7 + 1)]]
    module.restore()
    assert layer(ONES).tolist() == [[10, 20]]


@pytest.mark.parametrize(("draw", "expected"), [(0.4, [10, 20]), (0.5, [18, 36]), (0.6, [18, 36])])
def test_a_module_is_dropped_where_the_draw_is_below_its_share(
    draw: float, expected: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, module = with_matrix(module_dropout=0.5)
    fixed_draws(monkeypatch, draw)
    assert layer(ONES).tolist() == [expected]
    module.eval()
    assert layer(ONES).tolist() == [[18, 36]]


@pytest.mark.parametrize(("scales", "second"), [(False, 36), (True, 52)])
def test_rows_of_a_whole_matrix_are_dropped_with_their_bias(
    scales: bool, second: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second row is kept; where the others are scaled up it counts twice: 20 + 2 * 2 * 8."""
    layer, _ = with_matrix(rank_dropout=0.5, rank_dropout_scale=scales)
    fixed_draws(monkeypatch, 0.5, 0.9)
    assert layer(ONES).tolist() == [[10, second]]


def dylora(**settings: Any) -> tuple[nn.Linear, DyLoraModule]:
    """Two blocks of two ranks; of an input of ones the first block makes 8 and the second 16."""
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data.zero_()
    module = DyLoraModule("dylora", layer, 2.0, lora_dim=4, alpha=3, block_size=2, **settings)
    for number, (down, up) in enumerate(zip(module.down_list, module.up_list, strict=True), start=1):
        down.data.fill_(number)
        up.data.fill_(1)
    prepare_module(module)
    module.apply_to()
    return layer, module


@pytest.mark.parametrize(("last", "value"), [(0, 2 * 8 * 3 / 2), (1, 2 * 24 * 3 / 4)])
def test_dylora_cuts_to_a_rank_scales_by_alpha_over_it_and_teaches_the_last_block(
    last: int, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, module = dylora()
    asked: list[int] = []
    monkeypatch.setattr(torch, "randint", lambda high, size, device: asked.append(high) or torch.tensor(last))
    output = layer(torch.ones(1, 4))
    assert output.tolist() == [[value] * 4]
    output.sum().backward()
    assert [down.grad is not None for down in module.down_list] == [number == last for number in range(2)]
    assert [up.grad is not None for up in module.up_list] == [number == last for number in range(2)]
    assert asked == [2]
    module.eval()
    assert layer(torch.ones(1, 4)).tolist() == [[36.0] * 4]
    assert asked == [2]


def test_dylora_and_ia3_are_dropped_where_the_draw_is_below_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randint", lambda *_, **__: torch.tensor(1))
    layer, module = dylora(module_dropout=0.5)
    scaled = nn.Linear(2, 1)
    scaled.weight.data, scaled.bias.data = torch.tensor([[1.0, 2.0]]), torch.tensor([10.0])
    ia3 = IA3Module("ia3", scaled, 2.0, module_dropout=0.5)
    ia3.weight.data.fill_(0.5)
    prepare_module(ia3)
    ia3.apply_to()
    for draw, outputs in ((0.4, (0.0, 13.0)), (0.5, (36.0, 16.0))):  # 3 * (1 + 0.5 * 2) and the bias
        fixed_draws(monkeypatch, draw)
        assert (layer(torch.ones(1, 4))[0, 0].item(), scaled(ONES).item()) == outputs
    fixed_draws(monkeypatch, 0.0)
    module.eval()
    ia3.eval()
    assert (layer(torch.ones(1, 4))[0, 0].item(), scaled(ONES).item()) == (36.0, 16.0)


@pytest.mark.parametrize("groups", [1, 2])
def test_an_adapter_of_a_grouped_convolution_is_merged_into_its_weight(groups: int) -> None:
    module = LohaModule("loha", nn.Conv2d(4, 4, 3, groups=groups), lora_dim=2)
    prepare_module(module)
    assert bool(module.bypass_mode) == (groups == 1)
