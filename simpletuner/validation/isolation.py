"""Keeps what draws pictures away from what trains: modes, gradients, generators and memory are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from simpletuner.precision.mixed import autocast

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily

# A VAE up to this size stays loaded between validations; a larger one would take memory from training.
SMALL_VAE_BYTES = 256 * 2**20


@contextmanager
def undisturbed(denoiser: nn.Module, device: torch.device, mixed_precision: str) -> Iterator[None]:
    """Eval mode, no gradients, `mixed_precision`; afterwards modes and generators are as before."""
    modes = {module: module.training for module in denoiser.modules()}
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.no_grad(), autocast(device, mixed_precision):
        denoiser.eval()
        try:
            yield
        finally:
            for module, was_training in modes.items():
                module.training = was_training


def num_bytes(module: nn.Module) -> int:
    """What a module's parameters take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


class LentVae:
    """Loads the VAE when a picture is decoded, and keeps it only if it is small."""

    def __init__(self, family: ModelFamily):
        self.family = family
        self._vae: nn.Module | None = None

    def load(self) -> nn.Module:
        if self._vae is None:
            self._vae = self.family.load_vae()
        return self._vae

    def keep_if_small(self) -> None:
        if self._vae is not None and num_bytes(self._vae) > SMALL_VAE_BYTES:
            self.free()

    def free(self) -> None:
        self._vae = None
        give_back_memory(self.family.device)


def give_back_memory(device: torch.device) -> None:
    """Let other users of the accelerator have what torch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
