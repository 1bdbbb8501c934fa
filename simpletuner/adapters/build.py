"""From `model_type` and `lora_type` to what is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from simpletuner.adapters.base import Adapter
from simpletuner.adapters.full import FullAdapter
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.adapters.reading import read_adapter
from simpletuner.config.options.adapter import AdapterOptions
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import FamilySpec


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
    lora: LoraSettings | None = None,
    init_file: Path | None = None,
    modules: Sequence[str] = (),
    low_modules: Sequence[str] = (),
) -> Adapter:
    """Attach what the configuration asks for to a frozen denoiser.

    Args:
        lycoris: the parsed `lycoris_config.json`; needed for lora_type lycoris.
        dtype: of the adapter's weights; full fine-tuning trains in the denoiser's own.
        lycoris_file: its path, for messages.
        lora: needed for lora_type standard.
        init_file: an adapter file to start from.
        modules: of full fine-tuning: parts of the names of the weights that train.
        low_modules: likewise, at half the rate.

    Raises:
        ConfigError: a combination that cannot be trained.
        DataError: the file to start from does not fit.
    """
    if model_type == "full":
        return FullAdapter(denoiser, spec, modules, low_modules)
    if model_type != "lora":
        raise ConfigError(Problem(f'"{model_type}" cannot be trained', key="model_type", allowed="lora, full"))
    # Read while the layers still have the names and classes that files know.
    start = read_adapter(init_file, spec, denoiser) if init_file else None
    adapter: Adapter
    if lora_type == "standard":
        adapter = attach_lora(denoiser, lora or LoraSettings(), spec, dtype, seed)
    elif lycoris is None:
        raise ConfigError(
            Problem(
                "lora_type lycoris needs a lycoris_config.json",
                key="lycoris_config",
                fix="write the path of one, for example config/lycoris_config.json",
            )
        )
    else:
        adapter = attach_lycoris(denoiser, lycoris, spec, dtype, seed, lycoris_file)
    if start is not None and not next(iter(adapter.trainable_parameters().values())).is_meta:
        untouched = adapter.start_from(start, str(init_file))
        new = f"; it says nothing of {len(untouched)} of the adapted layers" if untouched else ""
        adapter.notices.append(f"started from {init_file}{new}")
        adapter.notices += [f"{init_file}: {line}" for line in start.notices]
    return adapter


def lora_settings(options: AdapterOptions) -> LoraSettings:
    """Standard LoRA as the configuration describes it."""
    return LoraSettings(
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        dropout=options.lora_dropout,
        init=options.lora_init_type,
        use_dora=options.use_dora,
        targets=options.lora_target,
        file_format=options.lora_format,
    )
