"""Optimizers by name: settings reach them, mistakes name their key, their state survives without pickle."""

from __future__ import annotations

import importlib
import inspect
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.options import all_options
from simpletuner.config.options.optimizer import REFUSED_OPTIMIZERS, OptimizerOptions, RefusedOptimizer
from simpletuner.errors import ConfigError, DataError, MissingDependency
from simpletuner.optim.optimizers import averaged_weights, build_optimizer, set_learning_rate
from simpletuner.optim.state import (
    group_numbers,
    load_group_numbers,
    load_optimizer_tensors,
    optimizer_tensors,
)


def named_weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (4, 5), "a.weight": (3,), "large.weight": (64, 80)}  # 8-bit states begin at 4096 values
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def train(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        torch.manual_seed(step)  # as the loop does: torchao rounds with the global generator
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


CONFIG: dict[str, Any] = {"learning_rate": 1e-2, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.1}
COMPILED = [name for name, row in OPTIMIZERS.items() if row.compiles]
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in COMPILED else name for name in OPTIMIZERS]


@pytest.fixture(autouse=True)
def _eager():
    """Compiling a step takes half a minute, and what it computes is the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("name", NAMES)
def test_a_row_says_what_its_class_takes(name: str) -> None:
    row = OPTIMIZERS[name]
    module, _, class_name = row.target.partition(":")
    signature = inspect.signature(getattr(importlib.import_module(module), class_name).__init__)
    defaults = {key: parameter.default for key, parameter in signature.parameters.items()}
    assert {key: defaults.get(key, "missing") for key in row.arguments} == dict(row.arguments)
    assert row.defaults.keys() <= row.arguments.keys()


def test_the_option_offers_the_rows() -> None:
    assert set(all_options()["optimizer"].choices) == set(OPTIMIZERS)
    assert not set(REFUSED_OPTIMIZERS) & set(OPTIMIZERS)
    assert set(get_args(RefusedOptimizer)) == set(REFUSED_OPTIMIZERS)


@pytest.mark.parametrize("name", ["adamw", "adamw_bf16", "torch-radam", "bnb-adamw8bit", "adamw_schedulefree", "soap"])
def test_the_options_reach_the_optimizer(name: str) -> None:
    group = build_optimizer(
        OptimizerOptions(optimizer=name, **(CONFIG | {"adam_epsilon": 1e-6})), named_weights()
    ).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (1e-2, (0.8, 0.95), 0.1, 1e-6)


def test_a_third_decay_stays_the_optimizer_s_own() -> None:
    assert build_optimizer(OptimizerOptions(optimizer="came", **CONFIG), named_weights()).param_groups[0]["betas"] == (
        0.8,
        0.95,
        0.9999,
    )
    group = build_optimizer(
        OptimizerOptions(optimizer="bnb-lion8bit-paged", learning_rate=1e-3), named_weights()
    ).param_groups[0]
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 0)


def test_muon_moves_matrices_and_leaves_the_rest_to_adamw() -> None:
    shapes = {"layer.weight": (4, 5), "layer.bias": (4,), "embed_tokens.weight": (9, 4)}
    parameters = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    matrices, rest = build_optimizer(OptimizerOptions(optimizer="muon", **CONFIG), parameters).param_groups
    assert [id(p) for p in matrices["params"]] == [id(parameters["layer.weight"])]
    assert [id(p) for p in rest["params"]] == [id(parameters["layer.bias"]), id(parameters["embed_tokens.weight"])]
    assert (rest["lr"], rest["betas"], rest["weight_decay"]) == (1e-2, (0.8, 0.95), 0.1)


@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_goes_down_a_slope(name: str) -> None:
    """A linear layer learns a map that it can express; the loss falls to a part of what it was."""
    torch.manual_seed(0)
    x, wanted = torch.randn(64, 8), torch.randn(8, 8)
    row = OPTIMIZERS[name]
    rate = 1.0 if row.tunes_lr or "adadelta" in name or "adagrad" in name else 1.0 if "sgd" in name else 0.02
    layer = {"layer.weight": nn.Parameter(torch.randn(8, 8) * 0.1)}
    optimizer = build_optimizer(OptimizerOptions(optimizer=name, learning_rate=rate, adam_weight_decay=0.0), layer)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        with torch.no_grad(), averaged_weights(optimizer):
            losses.append(((x @ layer["layer.weight"] - x @ wanted) ** 2).mean().item())
        ((x @ layer["layer.weight"] - x @ wanted) ** 2).mean().backward()
        optimizer.step()
    assert losses[-1] < (0.9 if name == "torch-adafactor" else 0.2) * losses[0]


def test_optimizer_config_wins_over_the_options() -> None:
    config = CONFIG | {"optimizer_config": {"weight_decay": 0.25, "amsgrad": True, "betas": [0.5, 0.6]}}
    group = build_optimizer(OptimizerOptions(optimizer="torch-adamw", **config), named_weights()).param_groups[0]
    assert (group["weight_decay"], group["amsgrad"], group["betas"]) == (0.25, True, (0.5, 0.6))


@pytest.mark.parametrize(
    ("name", "config", "key", "says"),
    [
        ("dadaptation", {}, "optimizer", "allowed: adafactor, adamw, adamw_bf16"),
        ("adamw_bf16", {"optimizer_config": {"kahan": True}}, "optimizer_config", "allowed: betas, eps, weight_decay"),
        ("adamw", {"optimizer_config": {"lr": 1}}, "optimizer_config", "learning_rate"),
        ("adamw", {"optimizer_config": {"eps": -1.0}}, "optimizer_config", "refuses its settings"),
    ],
)
def test_each_mistake_names_its_key_and_what_is_allowed(name: str, config, key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(OptimizerOptions(optimizer=name, **(CONFIG | config)), named_weights())
    assert caught.value.problems[0].key == key
    assert says in caught.value.render()


def test_what_has_to_be_compiled_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(MissingDependency, match=r"(?s)C\+\+ compiler.*bnb-adamw8bit"):
        build_optimizer(OptimizerOptions(optimizer="ao-adamw8bit", **CONFIG), named_weights())


def test_a_rate_in_a_tensor_stays_the_same_tensor() -> None:
    optimizer = build_optimizer(OptimizerOptions(optimizer="ao-adamw8bit", **CONFIG), named_weights())
    tensor = optimizer.param_groups[0]["lr"]
    set_learning_rate(optimizer, 0.25)
    assert optimizer.param_groups[0]["lr"] is tensor
    assert tensor.item() == 0.25


def test_schedule_free_s_average_is_what_its_authors_compute() -> None:
    """x of the paper (arXiv 2405.15682): the mean of all z where the rate is constant and r is 0."""
    parameters = {"w": nn.Parameter(torch.zeros(4))}
    optimizer = build_optimizer(
        OptimizerOptions(optimizer="adamw_schedulefree", learning_rate=0.1, adam_weight_decay=0.0), parameters
    )
    iterates = []
    for step in range(5):
        train(optimizer, parameters, range(step, step + 1))
        iterates.append(optimizer.state[parameters["w"]]["z"].clone())
    before = parameters["w"].detach().clone()
    with averaged_weights(optimizer):
        torch.testing.assert_close(parameters["w"].detach(), torch.stack(iterates).mean(0))
    assert torch.equal(parameters["w"], before)
    train(optimizer, parameters, range(5, 6))  # it is in training mode again


def test_inside_of_autocast_products_are_of_averaged_weights_and_then_of_the_trained_ones_again() -> None:
    """Autocast keeps 16-bit copies of weights until its context ends."""
    layer = nn.Linear(1, 1, bias=False)
    parameters = {"w": layer.weight}
    optimizer = build_optimizer(OptimizerOptions(optimizer="adamw_schedulefree", learning_rate=1.0), parameters)
    train(optimizer, parameters, range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        products, weights = [], []
        for is_averaged in (False, True, False):
            with averaged_weights(optimizer) if is_averaged else nullcontext():
                products.append(layer(torch.ones(1)).item())
                weights.append(layer.weight.bfloat16().item())
    assert products == weights
    assert products[0] != products[1]


def test_the_seed_of_a_run_is_that_of_an_optimizer_which_rounds_at_random() -> None:
    after = []
    for seed in (1, 2, 1):
        parameters = named_weights(torch.bfloat16)
        optimizer = build_optimizer(OptimizerOptions(optimizer="adamw_bf16", learning_rate=1e-3), parameters, seed)
        train(optimizer, parameters, range(1))
        after.append(parameters["large.weight"].detach())
    assert torch.equal(after[0], after[2])
    assert not torch.equal(after[0], after[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_state_survives_files_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype == torch.bfloat16 and not OPTIMIZERS[name].bf16_weights:
        pytest.skip("its weights are float32")
    whole = named_weights(dtype)
    undisturbed = build_optimizer(OptimizerOptions(optimizer=name, **CONFIG), whole, seed=3)
    train(undisturbed, whole, range(6))

    parameters = named_weights(dtype)
    optimizer = build_optimizer(OptimizerOptions(optimizer=name, **CONFIG), parameters, seed=3)
    train(optimizer, parameters, range(3))
    tensors, plain = optimizer_tensors(optimizer, parameters)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(plain))

    resumed = build_optimizer(OptimizerOptions(optimizer=name, **CONFIG), parameters, seed=3)
    saved = json.loads((tmp_path / "state.json").read_text())
    load_optimizer_tensors(resumed, parameters, load_file(tmp_path / "optimizer.safetensors"), saved)
    again, plain_again = optimizer_tensors(resumed, parameters)
    assert plain_again == plain
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) and again[key].dtype == tensors[key].dtype for key in tensors)

    train(resumed, parameters, range(3, 6))
    assert all(torch.equal(parameters[key], whole[key]) for key in whole)


def test_a_matrix_that_lies_in_columns_lies_so_again(tmp_path: Path) -> None:
    parameters = {"w": nn.Parameter(torch.zeros(4, 6))}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    columns = torch.arange(24.0).view(6, 4).t()
    optimizer.state[parameters["w"]] = {"Q": columns, "more": [columns.clone()]}
    tensors, plain = optimizer_tensors(optimizer, parameters)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    saved = json.loads(json.dumps(plain))
    load_optimizer_tensors(optimizer, parameters, load_file(tmp_path / "optimizer.safetensors"), saved)
    again = optimizer.state[parameters["w"]]
    assert torch.equal(again["Q"], columns)
    assert again["Q"].stride() == columns.stride() == (1, 4)
    assert again["more"][0].stride() == columns.clone().stride()


def test_a_state_of_eight_bits_is_saved_as_eight_bits() -> None:
    for name in ("bnb-lion8bit-paged", "ao-adamw8bit"):
        parameters = {"w": nn.Parameter(torch.randn(128, 64))}
        optimizer = build_optimizer(OptimizerOptions(optimizer=name, **CONFIG), parameters)
        train(optimizer, parameters, range(1))
        tensors, _ = optimizer_tensors(optimizer, parameters)
        assert [t.shape for t in tensors.values() if t.dtype == torch.uint8] == [(128, 64)] * (1 + ("ao" in name))


@pytest.mark.parametrize(("name", "is_paged"), [("bnb-lion8bit-paged", True), ("bnb-lion8bit", False)])
def test_a_loaded_state_lies_in_the_memory_that_a_paged_optimizer_makes(name: str, is_paged: bool) -> None:
    parameters = {"w": nn.Parameter(torch.randn(128, 64))}
    optimizer, resumed = (build_optimizer(OptimizerOptions(optimizer=name, **CONFIG), parameters) for _ in range(2))
    train(optimizer, parameters, range(1))
    pages: list[torch.Tensor] = []

    def page(parameter: nn.Parameter, dtype: torch.dtype) -> torch.Tensor:
        pages.append(torch.zeros_like(parameter, dtype=dtype))
        return pages[-1]

    resumed.get_state_buffer = page  # type: ignore[attr-defined]
    load_optimizer_tensors(resumed, parameters, *optimizer_tensors(optimizer, parameters))
    found, saved = resumed.state[parameters["w"]]["state1"], optimizer.state[parameters["w"]]["state1"]
    assert any(found is each for each in pages) == is_paged
    assert len(pages) == is_paged
    assert torch.equal(found, saved)


def test_a_loaded_state_shares_no_memory_with_the_file() -> None:
    parameters = named_weights()
    optimizer = build_optimizer(OptimizerOptions(optimizer="adamw", **CONFIG), parameters)
    train(optimizer, parameters, range(1))
    tensors, plain = optimizer_tensors(optimizer, parameters)
    kept = {key: value.clone() for key, value in tensors.items()}
    resumed = build_optimizer(OptimizerOptions(optimizer="adamw", **CONFIG), parameters)
    load_optimizer_tensors(resumed, parameters, kept, plain)
    train(resumed, parameters, range(2))
    assert all(torch.equal(kept[key], tensors[key]) for key in kept)


def test_settings_come_from_the_configuration_not_from_the_checkpoint() -> None:
    parameters = named_weights()
    optimizer = build_optimizer(OptimizerOptions(optimizer="adamw", **CONFIG), parameters)
    train(optimizer, parameters, range(1))
    tensors, plain = optimizer_tensors(optimizer, parameters)
    resumed = build_optimizer(OptimizerOptions(optimizer="adamw", **(CONFIG | {"learning_rate": 0.5})), parameters)
    load_optimizer_tensors(resumed, parameters, tensors, plain)
    assert resumed.param_groups[0]["lr"] == 0.5


def test_counters_stay_where_the_optimizer_keeps_them() -> None:
    """On `meta`, in place of an accelerator: torch's RAdam counts in main memory, fused AdamW beside its weights."""

    def made() -> tuple[torch.optim.Optimizer, dict[str, nn.Parameter]]:
        parameters = {"w": nn.Parameter(torch.empty(3, device="meta"))}
        return build_optimizer(OptimizerOptions(optimizer="torch-radam", **CONFIG), parameters), parameters

    optimizer, parameters = made()
    optimizer.state[parameters["w"]] = {"step": torch.tensor(3.0), "exp_avg": torch.empty(3, device="meta")}
    tensors, plain = optimizer_tensors(optimizer, parameters)
    assert plain["on_host"] == ["step"]
    resumed, others = made()
    load_optimizer_tensors(resumed, others, tensors, plain)
    devices = {key: value.device.type for key, value in resumed.state[others["w"]].items()}
    assert devices == {"step": "cpu", "exp_avg": "meta"}


def test_a_fresh_optimizer_has_no_state_and_takes_none() -> None:
    parameters = named_weights()
    tensors, plain = optimizer_tensors(
        build_optimizer(OptimizerOptions(optimizer="adamw", **CONFIG), parameters), parameters
    )
    assert tensors == {}
    resumed = build_optimizer(OptimizerOptions(optimizer="adamw", **CONFIG), parameters)
    load_optimizer_tensors(resumed, parameters, tensors, plain)
    assert not resumed.state


def test_the_state_of_another_run_is_refused() -> None:
    parameters = named_weights()
    optimizer = build_optimizer(OptimizerOptions(optimizer="adamw", **CONFIG), parameters)
    train(optimizer, parameters, range(1))
    tensors, plain = optimizer_tensors(optimizer, parameters)
    with pytest.raises(DataError, match="AdamWBF16"):
        load_optimizer_tensors(
            build_optimizer(OptimizerOptions(optimizer="adamw_bf16", **CONFIG), parameters), parameters, tensors, plain
        )
    renamed = {key.replace("a.weight", "c.weight"): value for key, value in tensors.items()}
    with pytest.raises(DataError, match=r"c\.weight"):
        load_optimizer_tensors(optimizer, parameters, renamed, plain)
    reshaped = {key: value[:1] if value.ndim else value for key, value in tensors.items()}
    with pytest.raises(DataError, match="1 x 80, not 64 x 80") as caught:
        load_optimizer_tensors(optimizer, parameters, reshaped, plain)
    missing = [problem.message.partition(" of ")[0] for problem in caught.value.problems]
    assert set(missing) == {"the optimizer state exp_avg", "the optimizer state exp_avg_sq"}


def test_what_prodigy_has_found_of_its_rate_is_saved(tmp_path: Path) -> None:
    """Gradients of one direction: after some steps `d` has left its start, and a resumed run goes on from there."""
    parameters = {"w": nn.Parameter(torch.zeros(3))}
    optimizer = build_optimizer(OptimizerOptions(optimizer="prodigy", learning_rate=1.0), parameters)
    start = optimizer.param_groups[0]["d"]

    def train_down(which: torch.optim.Optimizer, weights: dict[str, nn.Parameter], count: int) -> None:
        for _ in range(count):
            weights["w"].grad = weights["w"].detach() - 5
            which.step()

    train_down(optimizer, parameters, 100)
    assert optimizer.param_groups[0]["d"] > 10 * start
    tensors, plain = optimizer_tensors(optimizer, parameters)
    plain = json.loads(json.dumps(plain))
    others = {"w": nn.Parameter(parameters["w"].detach().clone())}
    resumed = build_optimizer(OptimizerOptions(optimizer="prodigy", learning_rate=1.0), others)
    load_optimizer_tensors(resumed, others, tensors, plain)
    for key in ("d", "d_max", "d_numerator", "k"):
        assert resumed.param_groups[0][key] == optimizer.param_groups[0][key], key
    train_down(optimizer, parameters, 5)
    train_down(resumed, others, 5)
    assert torch.equal(others["w"], parameters["w"])


def test_weights_at_half_the_rate_are_a_group_of_their_own() -> None:
    options = OptimizerOptions(
        optimizer="adamw", trainable_modules=("a.",), trainable_modules_low_learning_rate=("b.", "large"), **CONFIG
    )
    parameters = named_weights()
    optimizer = build_optimizer(options, parameters)
    whole, half = optimizer.param_groups
    assert [id(each) for each in whole["params"]] == [id(parameters["a.weight"])]
    assert [id(each) for each in half["params"]] == [id(parameters["b.weight"]), id(parameters["large.weight"])]
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in (whole, half)] == [0.5, 0.25]


def test_one_decay_that_is_written_leaves_the_other_the_optimizer_s_own() -> None:
    for written, expected in (
        ({"adam_beta1": 0.5}, (0.5, 0.999)),
        ({"adam_beta2": 0.5}, (0.9, 0.5)),
        ({}, (0.9, 0.999)),
    ):
        options = OptimizerOptions(optimizer="adamw", learning_rate=1e-2, **written)
        assert build_optimizer(options, named_weights()).param_groups[0]["betas"] == expected


def test_the_epsilon_of_muon_is_that_of_the_adamw_inside() -> None:
    options = OptimizerOptions(optimizer="muon", **(CONFIG | {"adam_epsilon": 1e-5}))
    *_, rest = build_optimizer(options, {"layer.bias": nn.Parameter(torch.zeros(3))}).param_groups
    assert (rest["eps"], rest["use_muon"]) == (1e-5, False)


def test_counters_of_groups_go_to_a_file_by_themselves() -> None:
    """Settings stay those of the configuration, and tensors are not among them."""
    first, second = (torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=rate) for rate in (0.5, 0.25))
    first.param_groups[0].update(k=3, d=0.125, step=torch.tensor(2.0))
    saved = json.loads(json.dumps(group_numbers(first)))
    assert saved == [{"k": 3, "d": 0.125}]
    load_group_numbers(second, {"groups": saved})
    assert {key: second.param_groups[0][key] for key in ("k", "d", "lr")} == {"k": 3, "d": 0.125, "lr": 0.25}


def test_states_that_share_memory_are_saved_apart() -> None:
    table = torch.arange(4.0)
    parameters = {name: nn.Parameter(torch.zeros(4)) for name in "ab"}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    for parameter in parameters.values():
        optimizer.state[parameter] = {"table": table}
    tensors, _ = optimizer_tensors(optimizer, parameters)
    assert [tensor.tolist() for tensor in tensors.values()] == [[0, 1, 2, 3]] * 2
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == 2


def test_a_state_of_eight_bits_comes_back_with_its_kind_and_its_numbers() -> None:
    parameters = {"w": nn.Parameter(torch.randn(128, 64))}
    first, second = (
        build_optimizer(OptimizerOptions(optimizer="ao-adamw8bit", **CONFIG), parameters) for _ in range(2)
    )
    train(first, parameters, range(1))
    tensors, plain = optimizer_tensors(first, parameters)
    load_optimizer_tensors(second, parameters, tensors, json.loads(json.dumps(plain)))
    before, after = (optimizer.state[parameters["w"]] for optimizer in (first, second))
    for key in ("exp_avg", "exp_avg_sq"):
        assert type(after[key]) is type(before[key])
        assert type(after[key]).__name__ == "OptimState8bit"
        assert torch.equal(after[key].dequantize(), before[key].dequantize())


def test_a_kind_of_state_that_is_not_known_is_refused() -> None:
    parameters = {"w": nn.Parameter(torch.zeros(2))}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    state = {"w": {"exp_avg": {"packed": "OptimState2bit", "parts": {}, "context": []}}}
    with pytest.raises(DataError, match="OptimState2bit is not a kind of optimizer state"):
        load_optimizer_tensors(optimizer, parameters, {}, {"class": "SGD", "states": state, "groups": [{}]})


def test_of_the_state_that_an_optimizer_had_nothing_is_left_when_another_one_is_loaded() -> None:
    """A weight that had no gradient yet has no state in the file."""
    parameters = named_weights()
    optimizer = build_optimizer(OptimizerOptions(optimizer="adamw", **CONFIG), parameters)
    parameters["a.weight"].grad = torch.ones(3)
    optimizer.step()
    tensors, plain = optimizer_tensors(optimizer, parameters)
    others = named_weights()
    resumed = build_optimizer(OptimizerOptions(optimizer="adamw", **CONFIG), others)
    train(resumed, others, range(1))
    load_optimizer_tensors(resumed, others, tensors, plain)
    assert list(resumed.state) == [others["a.weight"]]
