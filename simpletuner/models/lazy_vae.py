"""Models needed for a while: loaded when asked for, freed when their memory is needed elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily

# A model up to this size stays loaded between validations; a larger one would take memory from training.
SMALL_BYTES = 256 * 2**20


class LazyVae:
    """A family's VAE, loaded at the first use."""

    def __init__(self, family: ModelFamily):
        self.family = family
        self._vae: nn.Module | None = None

    def load(self) -> nn.Module:
        if self._vae is None:
            self._vae = self.family.load_vae()
        return self._vae

    def keep_if_small(self) -> None:
        if self._vae is not None and num_bytes(self._vae) > SMALL_BYTES:
            self.free()

    def free(self) -> None:
        self._vae = None
        give_back_memory(self.family.device)


def num_bytes(module: nn.Module) -> int:
    """What a module's parameters take."""
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def give_back_memory(device: torch.device) -> None:
    """Let other users of the accelerator have what torch keeps for later."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
