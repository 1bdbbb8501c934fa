"""From `model_type` and `lora_type` to what is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from simpletuner.activation_memory.modules import set_activation_memory
from simpletuner.adapters.base import Adapter
from simpletuner.adapters.full import FullAdapter
from simpletuner.adapters.lora import LoraSettings, attach_lora
from simpletuner.adapters.lycoris import attach_lycoris
from simpletuner.adapters.reading import read_adapter
from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import TrainConfig
from simpletuner.config.options.adapter import AdapterOptions
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import FamilySpec
from simpletuner.models.devices import adapter_dtype
from simpletuner.models.family import ModelFamily


def attach_adapter(loaded: LoadedRun, family: ModelFamily, denoiser: nn.Module) -> Adapter:
    """What the configuration trains, attached to a denoiser; `simpletuner plan` gives it one without values."""
    if (level := loaded.config.model.activation_memory) is not None:
        set_activation_memory(denoiser, level)
    return build_adapter(denoiser, family.spec_of_weights, loaded.config, loaded.lycoris)  # its files say which spec


def build_adapter(
    denoiser: nn.Module, spec: FamilySpec, config: TrainConfig, lycoris: Mapping[str, Any] | None
) -> Adapter:
    """Attach what the configuration asks for to a frozen denoiser.

    Args:
        lycoris: the parsed `lycoris_config.json`; needed for lora_type lycoris.

    Raises:
        ConfigError: there is no `lycoris_config.json`, or it cannot be attached.
        DataError: the file to start from does not fit.
    """
    if config.model.model_type == "full":
        modules, low_modules = config.optimizer.trainable_modules, config.optimizer.trainable_modules_low_learning_rate
        return FullAdapter(denoiser, spec, modules, low_modules)
    options, dtype, seed = config.adapter, adapter_dtype(config), config.training.seed
    init_file = options.init_lora
    # Read while the layers still have the names and classes that files know.
    start = read_adapter(init_file, spec, denoiser) if init_file else None
    adapter: Adapter
    if options.lora_type == "standard":
        adapter = attach_lora(denoiser, lora_settings(options), spec, dtype, seed)
    elif lycoris is None:
        raise ConfigError(
            Problem(
                "lora_type lycoris needs a lycoris_config.json",
                key="lycoris_config",
                fix="write the path of one, for example config/lycoris_config.json",
            )
        )
    else:
        file = str(options.lycoris_config) if options.lycoris_config else None
        adapter = attach_lycoris(denoiser, lycoris, spec, dtype, seed, file)
    if start is not None and not next(iter(adapter.trainable_parameters().values())).is_meta:
        untouched = adapter.start_from(start, str(init_file))
        new = f"; it has no weights for {len(untouched)} of the adapted layers" if untouched else ""
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
