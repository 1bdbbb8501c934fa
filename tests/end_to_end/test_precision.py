"""Adapters on packed bases in whole runs: they learn, they resume, their files are proved, images come of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from simpletuner.adapters.build import attach_adapter
from simpletuner.cache.fingerprints import prompt_fingerprint
from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.options import all_options
from simpletuner.config.options.optimizer import OptimizerOptions
from simpletuner.data.digests import DigestMemo
from simpletuner.errors import ConfigError
from simpletuner.models.build import build_family
from simpletuner.optim.optimizers import build_optimizer
from simpletuner.precision.linear import QuantizedLinear
from simpletuner.precision.quantize import copy_unpacked, quantized_layers
from simpletuner.training.planning.shapes import empty_batch
from simpletuner.training.step import compute_losses, sample_noise
from tests.runs import (
    load_here,
    metrics,
    require_same_bits_after_a_stop,
    run_forked,
    slow_but,
    train_here,
    train_in_two,
    write_run,
)
from tests.tiny_folders import TINY_FOLDERS

PRECISIONS = [name for name in all_options()["base_model_precision"].choices if name != "no_change"]
QUICK = ("int8-quanto", "nf4-bnb")
ADAPTERS = {"lokr": {}, "lora": {"lora_type": "standard", "lycoris_config": None, "lora_rank": 4, "lora_dropout": 0.0}}


@pytest.mark.parametrize("precision", slow_but(PRECISIONS, QUICK))
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapter_trains_on_a_packed_base(precision: str, adapter: str, tmp_path: Path, omnigen_folder: Path) -> None:
    loaded = load_here(write_run(tmp_path, omnigen_folder, base_model_precision=precision, **ADAPTERS[adapter]))
    family = build_family(loaded.config)
    denoiser = family.load_base()
    before = {path: layer.weight for path, layer in quantized_layers(denoiser).items()}
    assert len(before) == 2 * 6
    trained = attach_adapter(loaded, family, denoiser)
    parameters = trained.trainable_parameters()
    optimizer = build_optimizer(OptimizerOptions(optimizer="adamw", learning_rate=1e-2), parameters)
    batch = empty_batch(family, 64, 64, family.encode_prompts(["a red star", "a blue moon"]))
    noise, quantiles = torch.randn(2, 4, 8, 8), torch.full((2,), 0.5, dtype=torch.float64)
    losses = []
    for _ in range(20):
        loss = compute_losses(family, denoiser, batch, noise, quantiles).weighted_sum
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 1e-3
    learning = {name for name, parameter in denoiser.named_parameters() if parameter.requires_grad}
    assert len(learning) == len(parameters)
    for path, layer in denoiser.named_modules():
        if isinstance(layer, QuantizedLinear):
            plain = path.replace(".base_layer", "")
            assert torch.equal(layer.weight, before[plain])


@pytest.mark.parametrize("precision", slow_but([*PRECISIONS, "fp8-torchao in 8 bits"], QUICK))
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_gradients_through_a_packed_base_are_as_near_as_its_weights(
    precision: str, adapter: str, tmp_path: Path, omnigen_folder: Path
) -> None:
    name, *in_8_bits = precision.split(" in ")
    options = {"base_model_precision": name, "quantize_activations": bool(in_8_bits), **ADAPTERS[adapter]}
    loaded = load_here(write_run(tmp_path, omnigen_folder, **options))
    family = build_family(loaded.config)
    plain, packed = family.load_denoiser(), family.load_base()
    pairs = [(layer.weight, plain.get_submodule(path).weight) for path, layer in quantized_layers(packed).items()]
    stored, original = (
        torch.cat([weight.detach().flatten() for weight in weights]) for weights in zip(*pairs, strict=True)
    )
    gradients = []
    for denoiser in (plain, packed):
        parameters = attach_adapter(loaded, family, denoiser).trainable_parameters().values()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        batch = empty_batch(family, 64, 64, family.encode_prompts(["a red star"]))
        quantiles = torch.full((1,), 0.5, dtype=torch.float64)
        compute_losses(family, denoiser, batch, sample_noise(batch, 0, 0), quantiles).weighted_sum.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
    error = (stored - original).norm() / original.norm()
    limit = 3 if in_8_bits or name == "int8dq-torchao" else 2  # of activations too
    assert 0 < (gradients[1] - gradients[0]).norm() < limit * error * gradients[0].norm()


ALGORITHMS: dict[str, dict[str, Any]] = {
    "lokr": {"factor": 4},
    "lokr, built": {"factor": 4, "bypass_mode": False},
    "lokr, decomposed": {"factor": 4, "dora_wd": True},
    "loha": {"algo": "loha", "linear_dim": 4},
    "locon, decomposed": {"algo": "locon", "linear_dim": 4, "dora_wd": True},
    "dylora": {"algo": "dylora", "linear_dim": 4, "block_size": 2},
    "diag-oft": {"algo": "diag-oft", "linear_dim": 4},
    "boft": {"algo": "boft", "linear_dim": 4},
    "glora": {"algo": "glora", "linear_dim": 4},
    "ia3": {"algo": "ia3"},
}


@pytest.mark.parametrize("name", slow_but(ALGORITHMS, ("lokr", "locon, decomposed", "diag-oft")))
def test_every_algorithm_does_on_a_packed_base_what_it_does_on_the_unpacked_weights(
    name: str, tmp_path: Path, omnigen_folder: Path
) -> None:
    folder = write_run(tmp_path, omnigen_folder, base_model_precision="int8-quanto", gradient_checkpointing=True)
    lycoris = {"algo": "lokr", "apply_preset": {"target_module": ["Attention", "FeedForward"]}} | ALGORITHMS[name]
    (folder / "lycoris_config.json").write_text(json.dumps(lycoris))
    loaded = load_here(folder)
    family = build_family(loaded.config)
    packed, plain = family.load_base(), family.load_denoiser()
    copy_unpacked(packed, plain)
    found = []
    for denoiser in (packed, plain):
        parameters = attach_adapter(loaded, family, denoiser).trainable_parameters()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        denoiser.eval()
        denoiser.enable_gradient_checkpointing()
        batch = empty_batch(family, 64, 64, family.encode_prompts(["a red star"]))
        quantiles = torch.full((1,), 0.5, dtype=torch.float64)
        loss = compute_losses(family, denoiser, batch, sample_noise(batch, 0, 0), quantiles).weighted_sum
        loss.backward()
        found.append((loss, {key: parameter.grad for key, parameter in parameters.items()}))
    (ours, our_gradients), (theirs, their_gradients) = found
    torch.testing.assert_close(ours, theirs)
    for key, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[key], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_text_encoders_are_packed_and_their_cache_knows(tmp_path: Path) -> None:
    model = TINY_FOLDERS["flux"](tmp_path / "model")
    found, keys = [], []
    for precision in ("no_change", "int8-quanto"):
        folder = write_run(tmp_path / precision, model, model_family="flux", text_encoder_2_precision=precision)
        family = build_family(load_here(folder).config)
        [embeds] = family.encode_prompts(["a red star"])
        found.append(embeds.tensors)
        assert bool(quantized_layers(family.encoders.encoder("text_encoder_2"))) == (precision != "no_change")
        assert not quantized_layers(family.encoders.encoder("text_encoder"))
        with DigestMemo(tmp_path / "digests.sqlite") as memo:
            keys.append(prompt_fingerprint(family, memo))
    plain, packed = (tensors["prompt_embeds"] for tensors in found)
    assert 0 < (packed - plain).norm() < 0.02 * plain.norm()
    assert torch.equal(found[0]["pooled_prompt_embeds"], found[1]["pooled_prompt_embeds"])
    assert keys[0] != keys[1]


@pytest.mark.slow
@pytest.mark.parametrize("adapter", slow_but(ADAPTERS, ("lokr",)))
@pytest.mark.parametrize("precision", slow_but(["int8-quanto", "int8dq-torchao"], ("int8-quanto",)))
def test_a_run_on_a_packed_base_resumes_to_the_same_bits_and_proves_its_file(
    precision: str, adapter: str, tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"base_model_precision": precision, "use_ema": True, "quantize_via": "cpu", **ADAPTERS[adapter]}
    straight, resumed = require_same_bits_after_a_stop(
        lambda folder: write_run(folder, omnigen_folder, **options), tmp_path, monkeypatch
    )
    for name in ("pytorch_lora_weights.safetensors", "ema/pytorch_lora_weights.safetensors"):
        assert (straight / name).read_bytes() == (resumed / name).read_bytes()
    products = json.loads((straight / "checkpoint-8" / "training_state.json").read_text())["products"]
    assert set(map(tuple, products.values())) == ({("direct", "direct")} if precision == "int8dq-torchao" else set())
    with pytest.raises(ConfigError, match="base_model_precision"):
        train_here(tmp_path / "stopped", "--base_model_precision=nf4-bnb", "--max_train_steps=9")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"base_model_precision": "int8-torchao"}, {"base_model_default_dtype": "fp32"}]
)
def test_half_precision_trains_with_a_scaled_loss_and_resumes(
    options: dict, tmp_path: Path, omnigen_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"mixed_precision": "fp16", "optimizer": "adamw", **options}
    straight = train_here(write_run(tmp_path / "straight", omnigen_folder, **options))
    folder = write_run(tmp_path / "stopped", omnigen_folder, **options)
    resumed = train_in_two(folder, 5, monkeypatch)
    names = [path.relative_to(straight) for path in (straight / "checkpoint-8").rglob("*.safetensors")]
    for name in names:
        expected, found = load_file(straight / name), load_file(resumed / name)
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
    state = json.loads((straight / "checkpoint-8" / "training_state.json").read_text())
    assert state["loss_scale"]["scale"] <= 2.0**16
    losses = [record["loss"] for record in metrics(straight, "step_done")]
    assert all(loss == loss and loss < 10 for loss in losses)


@pytest.mark.slow
def test_images_can_be_generated_on_a_packed_base(tmp_path: Path, omnigen_folder: Path) -> None:
    arguments = ["generate", "--model", str(omnigen_folder), "--model-family", "omnigen", "--prompt", "a star"]
    arguments += ["--width", "64", "--height", "64", "--steps", "2", "--output", "star.png"]
    done = run_forked(tmp_path, *arguments, "--base-precision", "int8-quanto")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "star.png").is_file()
    refused = run_forked(tmp_path, *arguments, "--base-precision", "int9")
    assert refused.returncode == 2
    assert "allowed: no_change, int8-quanto" in refused.stderr


@pytest.mark.ci
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_one_step_of_every_optimizer_on_every_packed_base(
    precision: str, adapter: str, tmp_path: Path, omnigen_folder: Path
) -> None:
    loaded = load_here(write_run(tmp_path, omnigen_folder, base_model_precision=precision, **ADAPTERS[adapter]))
    family = build_family(loaded.config)
    batch = empty_batch(family, 64, 64, family.encode_prompts(["a red star"]))
    noise, quantiles = torch.randn(1, 4, 8, 8), torch.full((1,), 0.5, dtype=torch.float64)
    for name in OPTIMIZERS:
        denoiser = family.load_base()
        trained = attach_adapter(loaded, family, denoiser)
        parameters = trained.trainable_parameters()
        with torch.compiler.set_stance("force_eager"):
            optimizer = build_optimizer(OptimizerOptions(optimizer=name, learning_rate=1e-2), parameters)
            loss = compute_losses(family, denoiser, batch, noise, quantiles).weighted_sum
            loss.backward()
            holders = [key for key, parameter in denoiser.named_parameters() if parameter.grad is not None]
            assert holders
            assert not [key for key in holders if "lokr" not in key and "lora" not in key]
            optimizer.step()
        assert all(torch.isfinite(parameter).all() for parameter in parameters.values()), name
