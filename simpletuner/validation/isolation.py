"""Keeps what generates images away from what trains: modes, gradients, generators and memory are as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from simpletuner.adapters.assistant import without_assistant
from simpletuner.precision.mixed import autocast


@contextmanager
def undisturbed(denoiser: nn.Module, device: torch.device, mixed_precision: str) -> Iterator[None]:
    """Eval mode, no gradients, `mixed_precision`, no assistant LoRA; afterwards all is as before."""
    modes = {module: module.training for module in denoiser.modules()}
    devices = [device] if device.type == "cuda" else []
    kept = torch.random.fork_rng(devices=devices)
    with kept, torch.no_grad(), autocast(device, mixed_precision), without_assistant(denoiser):
        denoiser.eval()
        try:
            yield
        finally:
            for module, was_training in modes.items():
                module.training = was_training
