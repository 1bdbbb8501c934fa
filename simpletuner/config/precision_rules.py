"""Rules of number formats: what can be packed, and what goes with what."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.draft import Draft
from simpletuner.errors import Problem

ENCODERS = 4


def packed_weights_do_not_train(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.model_type == "full" and config.base_model_precision != "no_change":
        message = f"{config.base_model_precision} weights cannot be trained, and model_type is full"
        fix = "set it to no_change, or train an adapter (model_type lora)"
        yield draft.problem(message, "base_model_precision", "no_change", fix)


def the_default_dtype_fits_the_products(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.base_model_default_dtype == "bf16" and config.mixed_precision != "bf16":
        message = f"bf16 weights do not go with mixed_precision {config.mixed_precision}"
        yield draft.problem(message, "base_model_default_dtype", "fp32", fix="remove the key")


def there_is_a_text_encoder_to_pack(draft: Draft) -> Iterator[Problem]:
    if draft.spec is None:
        return
    count = sum(component.role == "text_encoder" for component in draft.spec.components)
    for number in range(count + 1, ENCODERS + 1):
        key = f"text_encoder_{number}_precision"
        if getattr(draft.config, key) != "no_change":
            has = f"{count} text encoder{'s' * (count != 1)}" if count else "no text encoder"
            yield draft.problem(f"{draft.spec.title} has {has}", key, "no_change", fix="remove the key")


PRECISION_RULES = (
    packed_weights_do_not_train,
    the_default_dtype_fits_the_products,
    there_is_a_text_encoder_to_pack,
)
