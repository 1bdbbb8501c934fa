"""What must hold between the keys of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from simpletuner.config.draft import Draft
from simpletuner.config.lora import unknown_targets
from simpletuner.config.lycoris_algorithms import algorithms_in, useless_settings
from simpletuner.config.optimizers import OPTIMIZERS
from simpletuner.config.trained_parts import LOW_MODULES, MODULES
from simpletuner.errors import Problem

# Starts that are a part of the base's weights, so that neither a file nor a magnitude of its own can stand beside them.
_STARTS_FROM_BASE = ("pissa", "pissa_niter_16", "olora")
# Keys of standard LoRA.
STANDARD_KEYS = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "lora_init_type", "lora_format", "use_dora")


def adapter_has_its_configuration(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if (
        config.model.model_type == "lora"
        and config.adapter.lora_type == "lycoris"
        and config.adapter.lycoris_config is None
    ):
        fix = "write the path of one, for example config/lycoris_config.json"
        yield draft.problem("lora_type lycoris needs this file", "lycoris_config", "a JSON file", fix)
    if config.model.model_type == "full" and config.adapter.lycoris_config is not None:
        message = f'"{config.adapter.lycoris_config}" has no use: model_type is "full", which trains without an adapter'
        yield draft.problem(message, "lycoris_config", fix='remove the key, or set model_type to "lora"')


def lora_targets_exist(draft: Draft) -> Iterator[Problem]:
    if draft.spec is None or draft.config.model.model_type != "lora" or draft.config.adapter.lora_type != "standard":
        return
    if not draft.config.adapter.lora_target:
        yield draft.problem("names no layer", "lora_target", fix="remove the key for the family's default")
    for entry, allowed, near in unknown_targets(draft.config.adapter.lora_target, draft.spec):
        fix = f'did you mean "{near}"?' if near else None
        yield draft.problem(f'"{entry}" matches no layer of {draft.spec.title}', "lora_target", allowed, fix)


def lora_start_is_one(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.model.model_type == "full" and config.adapter.init_lora is not None:
        message = f'"{config.adapter.init_lora}" has no use: model_type is "full", which trains without an adapter'
        yield draft.problem(message, "init_lora", fix="merge it into the model first: simpletuner export --merge")
    if config.model.model_type != "lora" or config.adapter.lora_type != "standard":
        return
    init, allowed = config.adapter.lora_init_type, "default, gaussian"
    if init in _STARTS_FROM_BASE and config.adapter.use_dora:
        yield draft.problem(f"{init} cannot be combined with use_dora", "lora_init_type", allowed)
    if init in _STARTS_FROM_BASE and config.adapter.init_lora is not None:
        yield draft.problem(f"{init} and init_lora are both a start", "lora_init_type", allowed, "remove one of them")
    if init == "orthogonal" and config.adapter.lora_rank % 2:
        yield draft.problem(
            f"{config.adapter.lora_rank} is odd, and lora_init_type orthogonal needs an even rank", "lora_rank"
        )


def parts_of_the_model_are_trained_whole(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    for key in (MODULES, LOW_MODULES):
        if not config.value(key):
            continue
        if config.model.model_type != "full":
            message = "chooses weights of the model itself, and model_type is lora"
            yield draft.problem(message, key, fix="remove the key (lora_target chooses layers of an adapter)")
        if config.processes.deepspeed_config:
            message = "chooses some of the weights, and deepspeed_config shards all"
            yield draft.problem(message, key, fix="use fsdp_enable in place of deepspeed_config, or remove the key")
    row = OPTIMIZERS.get(config.optimizer.optimizer)
    if config.optimizer.trainable_modules_low_learning_rate and row and (row.tunes_lr or row.matrix_only):
        message = f"{config.optimizer.optimizer} has one learning rate for all weights"
        yield draft.problem(message, LOW_MODULES, fix="use adamw_bf16, or remove the key")


def assistant_serves_an_adapter(draft: Draft) -> Iterator[Problem]:
    config, key = draft.config, "assistant_lora_path"
    is_wanted = config.adapter.assistant_lora_path is not None and config.adapter.assistant_lora_strength > 0
    if not is_wanted:
        return
    if config.model.model_type != "lora":
        if draft.origin(key).kind != "family":
            yield draft.problem("is beside an adapter that trains, and model_type is full", key, fix="remove the key")
        return
    for spread in ("fsdp_enable", "deepspeed_config"):
        if config.value(spread):
            message = f"{spread} shards the base, and the assistant LoRA needs a whole one"
            yield draft.problem(message, key, fix=f"remove {spread}, or set assistant_lora_strength to 0")


def joined_magnitudes_have_their_base(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    joins = draft.spec is not None and config.adapter.lora_format in draft.spec.keys.joining_forms
    if joins and config.model.model_type == "lora" and config.adapter.use_dora and config.processes.fsdp_enable:
        message = (
            f"{config.adapter.lora_format} files join layers, with use_dora by the lengths of the base's rows, and "
        )
        message += "fsdp_enable shards those across the processes"
        fix = "train with diffusers; `simpletuner export` makes the other afterwards"
        yield draft.problem(message, "lora_format", "diffusers, lycoris", fix)


def weights_that_are_read_are_plain(draft: Draft) -> Iterator[Problem]:
    adapter, precision = draft.config.adapter, draft.config.precision.base_model_precision
    if precision == "no_change" or draft.config.model.model_type != "lora":
        return
    fix = "set base_model_precision to no_change"
    if adapter.lora_type == "standard" and adapter.lora_init_type in _STARTS_FROM_BASE:
        message = f"{adapter.lora_init_type} decomposes the base's weights, and {precision} packs them"
        yield draft.problem(message, "lora_init_type", "default, gaussian, orthogonal", fix)
    if isinstance(draft.lycoris, dict) and "full" in _algorithms(draft.lycoris):
        message = f"full trains whole weights, and base_model_precision is {precision}"
        yield draft.problem(message, "lycoris_config", "another algo", fix)


def _algorithms(lycoris: Mapping[str, Any]) -> set[str]:
    """Those of a configuration that may be at fault elsewhere."""
    try:
        return algorithms_in(lycoris)
    except (AttributeError, TypeError):
        return set()


def adapter_keys_have_a_use(draft: Draft) -> Iterator[str]:
    config = draft.config
    uses_lora = config.model.model_type == "lora" and config.adapter.lora_type == "standard"
    for key in STANDARD_KEYS:
        if key in draft.origins and not uses_lora:
            what = "lora_type lycoris" if config.model.model_type == "lora" else "model_type full"
            yield f"{draft.origin(key)}: {key}: has no use with {what}"
    if uses_lora and config.adapter.lycoris_config is not None:
        yield f"{draft.origin('lycoris_config')}: lycoris_config: has no use with lora_type standard"


def lycoris_settings_have_a_use(draft: Draft) -> Iterator[str]:
    # A configuration at fault is reported as such.
    if isinstance(draft.lycoris, dict) and not draft.faulty:
        for line in useless_settings(draft.lycoris):
            yield f"{draft.config.adapter.lycoris_config}: {line}"


def decomposed_files_have_few_readers(draft: Draft) -> Iterator[str]:
    """Other programs take weight decomposition for another function, or for none."""
    config = draft.config
    if draft.spec is None or config.model.model_type != "lora":
        return
    if config.adapter.lora_type == "standard" and config.adapter.use_dora:
        readers = draft.spec.read_by(config.adapter.lora_format, "dora")
        line = f"{draft.origin('use_dora')}: use_dora: files in the {config.adapter.lora_format} format are {readers}"
        if config.adapter.lora_format != "diffusers":
            line += f"; with lora_format diffusers they are {draft.spec.read_by('diffusers', 'dora')}"
        yield line
    if config.adapter.lora_type == "lycoris" and isinstance(draft.lycoris, dict) and draft.lycoris.get("dora_wd"):
        yield f"{config.adapter.lycoris_config}: dora_wd: {draft.spec.read_by('lycoris', 'dora')}"


ADAPTER_RULES = (
    adapter_has_its_configuration,
    lora_targets_exist,
    lora_start_is_one,
    assistant_serves_an_adapter,
    joined_magnitudes_have_their_base,
    weights_that_are_read_are_plain,
    parts_of_the_model_are_trained_whole,
)
ADAPTER_NOTICES = (adapter_keys_have_a_use, lycoris_settings_have_a_use, decomposed_files_have_few_readers)
