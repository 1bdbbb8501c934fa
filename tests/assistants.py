"""Assistant LoRAs for tests: files of random weights that change a denoiser enough to be seen."""

from __future__ import annotations

from pathlib import Path

import torch

from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.models.family import ModelFamily


def write_assistant(path: Path, family: ModelFamily, seed: int = 5, size: float = 0.3, **settings: object) -> Path:
    """A LoRA of rank 2 and alpha 3 on the family's default layers; returns `path`."""
    adapter = attach_lora(
        family.load_denoiser(), LoraSettings(rank=2, alpha=3, **settings), family.spec, torch.float32, seed=0
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.trainable_parameters().values():
            parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    adapter.save(path, {})
    return path
