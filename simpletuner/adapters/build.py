"""From `model_type` and `lora_type` to what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from simpletuner.adapters.base import Adapter
from simpletuner.adapters.full import FullAdapter
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.errors import ConfigError, Problem
from simpletuner.models.spec import FamilySpec


def build_adapter(
    denoiser: nn.Module,
    spec: FamilySpec,
    *,
    model_type: str,
    lora_type: str,
    lycoris: Mapping[str, Any] | None,
    dtype: torch.dtype,
    seed: int,
    lycoris_file: str | None = None,
) -> Adapter:
    """Attach what the configuration asks for to a frozen denoiser.

    Args:
        lycoris: the parsed `lycoris_config.json`; needed for lora_type lycoris.
        dtype: of the adapter's weights; full fine-tuning trains in the denoiser's own.
        lycoris_file: its path, for messages.

    Raises:
        ConfigError: a combination that cannot be trained.
    """
    if model_type == "full":
        return FullAdapter(denoiser, spec)
    if model_type != "lora":
        raise ConfigError(Problem(f'"{model_type}" cannot be trained', key="model_type", allowed="lora, full"))
    if lora_type != "lycoris":
        raise ConfigError(
            Problem(
                f'"{lora_type}" adapters cannot be trained by this version',
                key="lora_type",
                allowed="lycoris",
                fix='set lora_type to lycoris; "algo": "lora" in lycoris_config.json trains a plain LoRA',
            )
        )
    if lycoris is None:
        raise ConfigError(
            Problem(
                "lora_type lycoris needs a lycoris_config.json",
                key="lycoris_config",
                fix="write the path of one, for example config/lycoris_config.json",
            )
        )
    return attach_lycoris(denoiser, lycoris, spec, dtype, seed, lycoris_file)
