"""Adapters on a base that was quantized first: found by the classes that the layers had, alive, and learning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simpletuner.adapters.base import MatchCount
from simpletuner.adapters.layers import is_linear, layer_class
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.errors import ConfigError
from simpletuner.models.omnigen.spec import OMNIGEN
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import perturb, run_stock


@pytest.fixture
def denoiser() -> nn.Module:
    from optimum.quanto import freeze, qint8, quantize

    denoiser = tiny_omnigen_transformer()
    quantize(denoiser, weights=qint8)
    freeze(denoiser)
    return denoiser


def test_a_quantized_layer_is_called_what_it_was(denoiser: nn.Module) -> None:
    layer = denoiser.layers[0].self_attn.to_q
    assert type(layer).__name__ == "QLinear"
    assert layer_class(layer) == "Linear"
    assert is_linear(layer)
    assert layer_class(nn.Linear(2, 2)) == "Linear"
    assert layer_class(denoiser.layers[0]) == "OmniGenBlock"


@pytest.mark.parametrize("algo", ["lokr", "loha", "locon", "glora", "diag-oft", "ia3", "dylora"])
def test_lycoris_finds_the_class_linear_and_learns_on_it(denoiser: nn.Module, algo: str) -> None:
    lycoris = {"algo": algo, "linear_dim": 4, "apply_preset": {"target_module": ["Linear"]}}
    base = run_stock(denoiser)
    adapter = attach_lycoris(denoiser, lycoris, OMNIGEN, torch.float32, 1)
    assert adapter.report == [MatchCount("Linear", "Linear", 18)]
    require_learning(denoiser, adapter.trainable_parameters(), base)


@pytest.mark.parametrize("use_dora", [False, True])
def test_standard_lora_learns_on_it(denoiser: nn.Module, use_dora: bool) -> None:
    base = run_stock(denoiser)
    adapter = attach_lora(denoiser, LoraSettings(rank=4, use_dora=use_dora), OMNIGEN, torch.float32, 1)
    require_learning(denoiser, adapter.trainable_parameters(), base)


def require_learning(denoiser: nn.Module, parameters: dict[str, nn.Parameter], base: torch.Tensor) -> None:
    torch.testing.assert_close(run_stock(denoiser), base, rtol=0, atol=1e-5)
    perturb(parameters)
    output = run_stock(denoiser)
    assert (output - base).abs().max() > 1e-3
    output.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in parameters.values())


def test_what_needs_plain_weights_is_refused(denoiser: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"lora_init_type: pissa decomposes the weight of .*, which is packed"):
        attach_lora(denoiser, LoraSettings(init="pissa"), OMNIGEN, torch.float32, 1)
    lycoris = {"algo": "full", "apply_preset": {"target_module": ["Attention"]}}
    with pytest.raises(ConfigError, match="those of the base are packed"):
        attach_lycoris(denoiser, lycoris, OMNIGEN, torch.float32, 1)
