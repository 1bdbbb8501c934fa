"""What the adapter tests share: the quickstart's configuration and a stock transformer with one fixed input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simpletuner.adapters.base import ADAPTER_CHILD

QUICKSTART = Path(__file__).parents[2] / "fixtures" / "quickstart" / "lycoris_config.json"


@pytest.fixture
def quickstart() -> dict[str, Any]:
    return json.loads(QUICKSTART.read_text())


def run_stock(denoiser: nn.Module) -> Tensor:
    """One row through diffusers' own OmniGen forward: 3 text tokens, the time token, 4 image tokens."""
    generator = torch.Generator().manual_seed(5)
    dtype = next(denoiser.parameters()).dtype
    length = 3 + 1 + 4
    return denoiser(
        torch.randn(1, 4, 4, 4, generator=generator).to(dtype),
        torch.tensor([0.3], dtype=dtype),
        input_ids=torch.tensor([[5, 9, 11]]),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=torch.ones(1, length, length),
        position_ids=torch.arange(length)[None],
        return_dict=False,
    )[0]


def perturb(parameters: dict[str, nn.Parameter], std: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def base_state_dict(denoiser: nn.Module) -> dict[str, Tensor]:
    """The denoiser's own weights under their own names, without those of an attached adapter.

    A LyCORIS network is a child of the denoiser; PEFT's layers stand in the place of those that they adapt.
    """
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in denoiser.state_dict().items()
        if not name.startswith(f"{ADAPTER_CHILD}.") and ".lora_" not in name
    }
