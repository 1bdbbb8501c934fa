"""Images of the EMA are those of a model that holds the EMA's weights, whatever was generated before them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.adapters.base import Adapter, values_replaced
from simpletuner.adapters.full import FullAdapter
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.config.options.optimizer import OptimizerOptions
from simpletuner.models.omnigen.spec import OMNIGEN
from simpletuner.optim.ema import EMA
from simpletuner.optim.optimizers import averaged_weights, build_optimizer
from simpletuner.validation.isolation import undisturbed
from tests.tiny import tiny_omnigen_transformer
from tests.unit.adapters.conftest import run_stock

CPU = torch.device("cpu")


def lycoris(**settings: Any) -> Callable[[nn.Module], Adapter]:
    config = {"linear_dim": 4, "apply_preset": {"target_module": ["Attention"]}, **settings}
    return lambda denoiser: attach_lycoris(denoiser, config, OMNIGEN, torch.float32, 0)


def lora(**settings: Any) -> Callable[[nn.Module], Adapter]:
    return lambda denoiser: attach_lora(denoiser, LoraSettings(rank=4, **settings), OMNIGEN, torch.float32, 0)


ADAPTERS: dict[str, Callable[[nn.Module], Adapter]] = {
    "LoRA": lora(),
    "DoRA": lora(use_dora=True),
    **{name: lycoris(algo=name) for name in ("lokr", "loha", "locon", "glora", "diag-oft", "boft", "ia3", "full")},
    "LoKr, whole factors": lycoris(algo="lokr", linear_dim=10000, factor=4),
    "LoKr, weight-decomposed": lycoris(algo="lokr", linear_dim=10000, factor=4, dora_wd=True),
    "DyLoRA": lycoris(algo="dylora", block_size=2),
    "all weights": lambda denoiser: FullAdapter(denoiser.requires_grad_(True), OMNIGEN),
}


def trained(attach: Callable[[nn.Module], Adapter]) -> tuple[nn.Module, Adapter, EMA]:
    """A denoiser whose adapter has gone far from its average."""
    denoiser = tiny_omnigen_transformer()
    adapter = attach(denoiser)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        ema = EMA(adapter.trainable_parameters(), 0.9)
        for parameter in adapter.trainable_parameters().values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return denoiser, adapter, ema


def output(denoiser: nn.Module) -> Tensor:
    return run_stock(denoiser).float()


@pytest.mark.parametrize("name", ADAPTERS)
def test_images_of_the_ema_are_those_of_a_model_that_holds_it(name: str) -> None:
    denoiser, adapter, ema = trained(ADAPTERS[name])
    with undisturbed(denoiser, CPU, "bf16"):
        live = output(denoiser)
        with ema.swapped_in(adapter.trainable_parameters()):
            found = output(denoiser)
        again = output(denoiser)
    with torch.no_grad():
        for key, parameter in adapter.trainable_parameters().items():
            parameter.copy_(ema.averages[key])
    with undisturbed(denoiser, CPU, "bf16"):
        expected = output(denoiser)
    assert float((live - expected).abs().max()) > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(again, live, rtol=0, atol=0)


def test_the_generators_of_a_gpu_are_kept_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processor's are kept in any case."""
    kept: list[list[torch.device]] = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: kept.append(devices) or nullcontext())
    net = nn.Linear(1, 1)
    for device in (torch.device("cuda", 1), CPU):
        with undisturbed(net, device, "no"):
            assert not torch.is_grad_enabled()
            assert not net.training
    assert net.training
    assert kept == [[torch.device("cuda", 1)], []]


@pytest.mark.parametrize("name", ["DoRA", "all weights"])
def test_weights_that_a_checkpoint_or_an_optimizer_puts_in_place_are_seen_too(name: str) -> None:
    denoiser, adapter, ema = trained(ADAPTERS[name])
    parameters = adapter.trainable_parameters()
    with undisturbed(denoiser, CPU, "bf16"):
        live = output(denoiser)
        with values_replaced(parameters, ema.averages):
            assert float((output(denoiser) - live).abs().max()) > 1e-2
        torch.testing.assert_close(output(denoiser), live, rtol=0, atol=0)

    optimizer = build_optimizer(OptimizerOptions(optimizer="adamw_schedulefree", learning_rate=0.05), parameters)
    for _ in range(3):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    with undisturbed(denoiser, CPU, "bf16"):
        training = output(denoiser)
        with averaged_weights(optimizer):
            averaged = output(denoiser)
        torch.testing.assert_close(output(denoiser), training, rtol=0, atol=0)
    with averaged_weights(optimizer), undisturbed(denoiser, CPU, "bf16"):
        torch.testing.assert_close(averaged, output(denoiser), rtol=0, atol=0)


def test_what_images_draw_moves_no_generator_of_training() -> None:
    net = nn.Linear(1, 1)
    before = torch.get_rng_state()
    with undisturbed(net, CPU, "no"):
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
