"""Rules of number formats: what can be packed, and what goes with what."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.draft import Draft
from simpletuner.errors import Problem

ENCODERS = 4
# Formats of one byte and one scale for each row of a weight.
EIGHT_BITS = ("int8-quanto", "int8-torchao", "int8dq-torchao", "fp8-quanto", "fp8uz-quanto", "fp8-torchao")


def packed_weights_do_not_train(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.model.model_type == "full" and config.precision.base_model_precision != "no_change":
        message = f"{config.precision.base_model_precision} weights cannot be trained, and model_type is full"
        fix = "set it to no_change, or train an adapter (model_type lora)"
        yield draft.problem(message, "base_model_precision", "no_change", fix)


def quantized_activations_have_8_bit_weights(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if not config.precision.quantize_activations or config.precision.base_model_precision in EIGHT_BITS:
        return
    message = f"goes with a base in 8 bits, and base_model_precision is {config.precision.base_model_precision}"
    fix = "set base_model_precision to int8-torchao, or remove the key"
    if config.precision.base_model_precision == "fp8wo-torchao":
        message = "fp8wo-torchao is float8 of weights only"
        fix = "set base_model_precision to fp8-torchao, or remove the key"
    if config.model.model_type == "full":
        message, fix = "weights that train are not packed, and model_type is full", "remove the key"
    yield draft.problem(message, "quantize_activations", f"true with {', '.join(EIGHT_BITS)}", fix)


def the_default_dtype_fits_the_products(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.precision.base_model_default_dtype == "bf16" and config.precision.mixed_precision != "bf16":
        message = f"bf16 weights do not go with mixed_precision {config.precision.mixed_precision}"
        yield draft.problem(message, "base_model_default_dtype", "fp32", fix="remove the key")


def there_is_a_text_encoder_to_pack(draft: Draft) -> Iterator[Problem]:
    if draft.spec is None:
        return
    count = sum(component.role == "text_encoder" for component in draft.spec.components)
    for number in range(count + 1, ENCODERS + 1):
        key = f"text_encoder_{number}_precision"
        if draft.config.value(key) != "no_change":
            has = f"{count} text encoder{'s' * (count != 1)}" if count else "no text encoder"
            yield draft.problem(f"{draft.spec.title} has {has}", key, "no_change", fix="remove the key")


def swapped_blocks_are_recomputed(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    key = "enable_group_offload" if config.model.enable_group_offload else "musubi_blocks_to_swap"
    if not config.value(key):
        return
    if config.model.model_type == "full":
        message = "only frozen weights can wait in main memory, and model_type is full"
        yield draft.problem(message, key, fix="remove the key, or train an adapter (model_type lora)")
    elif config.processes.fsdp_enable or config.processes.deepspeed_config:
        other = "fsdp_enable" if config.processes.fsdp_enable else "deepspeed_config"
        message = f"{other} divides the weights among the processes already"
        yield draft.problem(message, key, fix="remove one of the two; fsdp_cpu_offload keeps the parts in main memory")
    elif config.precision.dynamo_backend != "no":
        message = "blocks that are compiled stay on the device"
        yield draft.problem(message, key, fix="remove the key, or set dynamo_backend to no")
    elif not config.model.gradient_checkpointing or config.model.gradient_checkpointing_interval not in (None, "1"):
        message = "a block that is not recomputed keeps its weights on the device until the backward pass"
        fix = "set gradient_checkpointing to true, and remove gradient_checkpointing_interval"
        yield draft.problem(message, key, fix=fix)


def what_belongs_to_checkpointing_has_it(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.model.gradient_checkpointing:
        if config.model.gradient_checkpointing_interval == "auto" and (
            config.processes.fsdp_enable or config.processes.deepspeed_config
        ):
            message = "each process would measure for itself, and processes that share weights fetch them together"
            yield draft.problem(message, "gradient_checkpointing_interval", "a whole number", fix="remove the key")
        return
    if config.model.gradient_checkpointing_interval is not None:
        message = "has no effect without gradient_checkpointing"
        yield draft.problem(message, "gradient_checkpointing_interval", fix="set gradient_checkpointing to true")
    if config.model.gradient_checkpointing_backend != "torch":
        message = "has no effect without gradient_checkpointing"
        yield draft.problem(message, "gradient_checkpointing_backend", fix="set gradient_checkpointing to true")


def compiled_blocks_keep_what_the_compiler_says(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.model.activation_memory == "lowest" and config.precision.dynamo_backend != "no":
        message = "of compiled blocks the compiler decides what is kept"
        yield draft.problem(message, "activation_memory", "low", fix="remove it, or set dynamo_backend to no")


def memory_is_planned_for_whole_models(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.model.memory is not None and (config.processes.fsdp_enable or config.processes.deepspeed_config):
        other = "fsdp_enable" if config.processes.fsdp_enable else "deepspeed_config"
        message = f"{other} divides the weights among the processes, for which nothing is planned"
        yield draft.problem(message, "memory", fix="remove one of the two")


def kernels_chosen_by_timing_are_not_deterministic(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.precision.deterministic and config.precision.dynamo_backend == "inductor":
        message = "inductor chooses its kernels by timing them at each start, so two starts may differ in the last bits"
        yield draft.problem(message, "deterministic", "false", fix="remove it, or set dynamo_backend to no")


PRECISION_RULES = (
    compiled_blocks_keep_what_the_compiler_says,
    kernels_chosen_by_timing_are_not_deterministic,
    memory_is_planned_for_whole_models,
    swapped_blocks_are_recomputed,
    what_belongs_to_checkpointing_has_it,
    packed_weights_do_not_train,
    quantized_activations_have_8_bit_weights,
    the_default_dtype_fits_the_products,
    there_is_a_text_encoder_to_pack,
)
