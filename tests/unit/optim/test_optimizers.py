"""Optimizers by name: settings reach them, mistakes name their key, their state survives without pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from simpletuner.errors import ConfigError, DataError
from simpletuner.optim.optimizers import OPTIMIZERS, build_optimizer, parse_optimizer_config
from simpletuner.optim.state import load_optimizer_tensors, optimizer_tensors


def named_weights(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"b.weight": (4, 5), "a.weight": (3,)}
    return {name: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for name, s in shapes.items()}


def train(optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()


CONFIG: dict[str, Any] = {"learning_rate": 1e-2, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_weight_decay": 0.1}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_options_reach_the_optimizer(name: str) -> None:
    group = build_optimizer(name, named_weights(), CONFIG | {"adam_epsilon": 1e-6}).param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (1e-2, (0.8, 0.95), 0.1, 1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_fits_a_line(name: str) -> None:
    x = torch.linspace(-1, 1, 32)[:, None]
    slope = {"slope": nn.Parameter(torch.zeros(1, 1))}
    optimizer = build_optimizer(name, slope, {"learning_rate": 0.05, "adam_weight_decay": 0.0})
    for _ in range(200):
        optimizer.zero_grad()
        (x @ slope["slope"] - 3 * x).square().mean().backward()
        optimizer.step()
    assert slope["slope"].item() == pytest.approx(3, abs=0.05)


def test_optimizer_config_wins_over_the_options() -> None:
    config = CONFIG | {"optimizer_config": "weight_decay=0.25,amsgrad=true"}
    group = build_optimizer("torch-adamw", named_weights(), config).param_groups[0]
    assert (group["weight_decay"], group["amsgrad"]) == (0.25, True)


def test_optimizer_config_is_read_with_its_types() -> None:
    text = "a=1, b=2.5e-3,c=true,d=None,e=word,"
    assert parse_optimizer_config(text) == {"a": 1, "b": 2.5e-3, "c": True, "d": None, "e": "word"}
    assert parse_optimizer_config({"betas": [0.9, 0.99]}) == {"betas": [0.9, 0.99]}
    assert parse_optimizer_config(None) == parse_optimizer_config("") == {}


@pytest.mark.parametrize(
    ("name", "config", "key", "says"),
    [
        ("bnb-lion8bit-paged", {}, "optimizer", "allowed: adamw, adamw_bf16, torch-adamw"),
        ("adamw_bf16", {"optimizer_config": "kahan=true"}, "optimizer_config", "allowed: betas, eps, weight_decay"),
        ("adamw", {"optimizer_config": "lr=1"}, "optimizer_config", "learning_rate"),
        ("adamw", {"optimizer_config": "amsgrad"}, "optimizer_config", "key=value"),
        ("adamw", {"adam_beta2": 1.5}, "optimizer_config", "refuses its settings"),
    ],
)
def test_each_mistake_names_its_key_and_what_is_allowed(name: str, config, key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_optimizer(name, named_weights(), CONFIG | config)
    assert caught.value.problems[0].key == key
    assert says in caught.value.render()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_files_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = named_weights(dtype)
    undisturbed = build_optimizer(name, whole, CONFIG, seed=3)
    train(undisturbed, whole, range(6))

    parameters = named_weights(dtype)
    optimizer = build_optimizer(name, parameters, CONFIG, seed=3)
    train(optimizer, parameters, range(3))
    tensors, plain = optimizer_tensors(optimizer, parameters)
    save_file(tensors, tmp_path / "optimizer.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(plain))

    resumed = build_optimizer(name, parameters, CONFIG, seed=3)
    saved = json.loads((tmp_path / "state.json").read_text())
    load_optimizer_tensors(resumed, parameters, load_file(tmp_path / "optimizer.safetensors"), saved)
    again, plain_again = optimizer_tensors(resumed, parameters)
    assert plain_again == plain
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) and again[key].dtype == tensors[key].dtype for key in tensors)

    train(resumed, parameters, range(3, 6))
    assert all(torch.equal(parameters[key], whole[key]) for key in whole)


def test_a_loaded_state_shares_no_memory_with_the_file() -> None:
    parameters = named_weights()
    optimizer = build_optimizer("adamw", parameters, CONFIG)
    train(optimizer, parameters, range(1))
    tensors, plain = optimizer_tensors(optimizer, parameters)
    kept = {key: value.clone() for key, value in tensors.items()}
    resumed = build_optimizer("adamw", parameters, CONFIG)
    load_optimizer_tensors(resumed, parameters, kept, plain)
    train(resumed, parameters, range(2))
    assert all(torch.equal(kept[key], tensors[key]) for key in kept)


def test_settings_come_from_the_configuration_not_from_the_checkpoint() -> None:
    parameters = named_weights()
    optimizer = build_optimizer("adamw", parameters, CONFIG)
    train(optimizer, parameters, range(1))
    tensors, plain = optimizer_tensors(optimizer, parameters)
    resumed = build_optimizer("adamw", parameters, CONFIG | {"learning_rate": 0.5})
    load_optimizer_tensors(resumed, parameters, tensors, plain)
    assert resumed.param_groups[0]["lr"] == 0.5


def test_a_fresh_optimizer_has_no_state_and_takes_none() -> None:
    parameters = named_weights()
    tensors, plain = optimizer_tensors(build_optimizer("adamw", parameters, CONFIG), parameters)
    assert tensors == {}
    resumed = build_optimizer("adamw", parameters, CONFIG)
    load_optimizer_tensors(resumed, parameters, tensors, plain)
    assert not resumed.state


def test_the_state_of_another_run_is_refused() -> None:
    parameters = named_weights()
    optimizer = build_optimizer("adamw", parameters, CONFIG)
    train(optimizer, parameters, range(1))
    tensors, plain = optimizer_tensors(optimizer, parameters)
    with pytest.raises(DataError, match="AdamWBF16"):
        load_optimizer_tensors(build_optimizer("adamw_bf16", parameters, CONFIG), parameters, tensors, plain)
    renamed = {key.replace("a.weight", "c.weight"): value for key, value in tensors.items()}
    with pytest.raises(DataError, match=r"c\.weight"):
        load_optimizer_tensors(optimizer, parameters, renamed, plain)
    reshaped = {key: value[:1] if value.ndim else value for key, value in tensors.items()}
    with pytest.raises(DataError, match="shape"):
        load_optimizer_tensors(optimizer, parameters, reshaped, plain)
