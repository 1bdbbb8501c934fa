"""A step of every family, adapter and number format on a device that is not the CPU: torch's `meta`.

There is nothing to read on it, so what asks for a value raises. What else a GPU would fail at or wait for is seen in
the operations: tensors of two devices in one, copies that wait, checks of results on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from simpletuner.adapters.base import Adapter
from simpletuner.adapters.full import FullAdapter
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.config.options.optimizer import OptimizerOptions
from simpletuner.families.registry import family_names, get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import ModelFamily
from simpletuner.optim.clipping import clip_by_norm
from simpletuner.optim.optimizers import build_optimizer
from simpletuner.precision.quantize import NumberFormats
from simpletuner.training.gradient_checkpointing import GradientCheckpointing
from simpletuner.training.planning.shapes import empty_batch
from simpletuner.training.step import compute_losses, sample_noise
from tests.tiny_folders import TINY_FOLDERS

META = torch.device("meta")
# They look at results on the host; on `meta` they look at nothing and pass.
CHECKS = {torch.ops.aten._linalg_check_errors.default, torch.ops.aten._assert_async.msg}


class Device(TorchDispatchMode):
    """Gathers what a GPU would fail at, or would hold the host for."""

    def __init__(self) -> None:
        super().__init__()
        self.faults: set[str] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        devices = {each.device.type for each in tensors if each.dim()}
        is_copy = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        if len(devices) > 1 and not is_copy:
            self.faults.add(f"{function}: tensors on {sorted(devices)}")
        target = kwargs.get("device")
        moves = function is torch.ops.aten._to_copy.default and target not in (None, tensors[0].device)
        if moves and not kwargs.get("non_blocking"):
            self.faults.add(f"{function}: waits for a copy of {tuple(tensors[0].shape)} to {target}")
        if function in CHECKS and "meta" in devices:
            self.faults.add(f"{function}: waits for a result")
        return function(*args, **kwargs)


def lora(denoiser: nn.Module, family: ModelFamily, **settings: Any) -> Adapter:
    return attach_lora(denoiser, LoraSettings(rank=2, **settings), family.spec, torch.float32, seed=0)


def lycoris(**settings: Any) -> Callable[[nn.Module, ModelFamily], Adapter]:
    config = {"linear_dim": 2, "apply_preset": {"target_module": ["Attention"]}, **settings}
    return lambda denoiser, family: attach_lycoris(denoiser, config, family.spec, torch.float32, seed=0)


ADAPTERS: dict[str, Callable[[nn.Module, ModelFamily], Adapter]] = {
    "LoRA": lora,
    "DoRA": lambda denoiser, family: lora(denoiser, family, use_dora=True),
    "LoRA, PiSSA": lambda denoiser, family: lora(denoiser, family, init="pissa"),
    "LoKr": lycoris(algo="lokr", linear_dim=10000, factor=4),
    "LoKr, weight-decomposed": lycoris(algo="lokr", factor=4, dora_wd=True),
    "OFT, constrained": lycoris(algo="diag-oft", constraint=0.1),
    "DyLoRA": lycoris(algo="dylora", block_size=2),
    **{name: lycoris(algo=name) for name in ("loha", "locon", "glora", "diag-oft", "boft", "ia3", "full")},
    "all weights": lambda denoiser, family: FullAdapter(denoiser.requires_grad_(True), family.spec),
}
PRECISIONS = (
    "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "nf4-bnb", "int8-torchao", "int4-torchao", "fp8-torchao",
)  # fmt: skip


@pytest.fixture(params=family_names(), scope="module")
def make_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], ModelFamily]:
    folder: Path = TINY_FOLDERS[request.param](tmp_path_factory.mktemp(request.param))
    spec = get_spec(request.param)

    def make() -> ModelFamily:
        return get_family_class(spec)(spec, ModelSource(str(folder)), torch.device("cpu"), torch.float32)

    return make


def faults_of_a_step(family: ModelFamily, attach: Callable[[nn.Module, ModelFamily], Adapter]) -> set[str]:
    """Loaded, packed and adapted on the CPU, moved as a run moves it, then one whole step."""
    embeds = family.encode_prompts(["a red star", "a moon"])
    batch = empty_batch(family, 64, 64, embeds)
    denoiser: Any = family.load_base()
    adapter = attach(denoiser, family)
    denoiser.to(META)
    family.device = META
    denoiser.enable_gradient_checkpointing(GradientCheckpointing(META))
    denoiser.train()
    parameters = adapter.trainable_parameters()
    optimizer = build_optimizer(
        OptimizerOptions(optimizer="torch-adamw", optimizer_config={"fused": False, "foreach": True}), parameters
    )
    with Device() as device:
        losses = compute_losses(
            family, denoiser, batch, sample_noise(batch, 0, 0), torch.tensor([0.3, 0.7], dtype=torch.float64)
        )
        losses.weighted_sum.backward()
        clip_by_norm(list(parameters.values()), 1.0)
        optimizer.step()
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    assert gradients
    assert all(gradient.is_meta for gradient in gradients)
    return device.faults


MARKS: dict[str, Any] = {"LoRA": (), "LoKr": (), "OFT, constrained": pytest.mark.slow, "boft": pytest.mark.slow}


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, pytest.mark.ci)) for name in ADAPTERS])
def test_every_adapter_is_whole_on_its_device_and_waits_for_nothing(name: str, make_family: Any) -> None:
    assert faults_of_a_step(make_family(), ADAPTERS[name]) == set()


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["LoRA", "LoKr"])
@pytest.mark.parametrize(
    "precision", [PRECISIONS[0], *(pytest.param(each, marks=pytest.mark.ci) for each in PRECISIONS[1:])]
)
def test_every_number_format_is_whole_on_its_device_and_waits_for_nothing(
    precision: str, adapter: str, make_family: Any
) -> None:
    family = make_family()
    family.number_formats = NumberFormats(base=precision, packs_on_device=False)
    assert faults_of_a_step(family, ADAPTERS[adapter]) == set()
