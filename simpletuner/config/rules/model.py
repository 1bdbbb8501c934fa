"""Which model: its family, its files, how its prompts are encoded."""

from __future__ import annotations

from collections.abc import Iterator

from simpletuner.config.checking import is_neutral, show_value
from simpletuner.config.draft import Draft
from simpletuner.config.options import all_options
from simpletuner.config.options.model import PROMPT_OPTIONS
from simpletuner.config.paths import SINGLE_FILE
from simpletuner.errors import Problem
from simpletuner.spelling import did_you_mean


def flavour_belongs_to_the_family(draft: Draft) -> Iterator[Problem]:
    flavour, spec = draft.config.model.model_flavour, draft.spec
    if spec and flavour and flavour not in spec.flavours:
        message = f'"{flavour}" is not a flavor of {spec.title}'
        fix = did_you_mean(flavour, spec.flavours)
        yield draft.problem(message, "model_flavour", ", ".join(spec.flavours), fix)


def a_single_file_is_named_once(draft: Draft) -> Iterator[Problem]:
    model, file = (
        draft.config.model.pretrained_model_name_or_path,
        draft.config.model.pretrained_transformer_model_name_or_path,
    )
    key = "pretrained_transformer_model_name_or_path"
    if file and not file.endswith(SINGLE_FILE):
        yield draft.problem(f'"{file}" is not a {SINGLE_FILE} file', key, f"a {SINGLE_FILE} file")
    if file and model and model.endswith(SINGLE_FILE):
        message = "pretrained_model_name_or_path names a single file already"
        yield draft.problem(message, key, fix="let that name a folder or hub id, or remove one of them")


def text_encoders_are_the_family_s(draft: Draft) -> Iterator[Problem]:
    encoders = [part.name for part in draft.spec.components if part.role == "text_encoder"] if draft.spec else []
    given = len(draft.config.model.text_encoder_paths or ())
    if draft.spec and given > len(encoders):
        message = f"names {given} text encoders, and {draft.spec.title} has {len(encoders)}"
        yield draft.problem(message, "text_encoder_paths", ", ".join(encoders) or "no such key", "remove the others")


def prompts_have_a_length_of_the_family(draft: Draft) -> Iterator[Problem]:
    length, key = draft.config.model.tokenizer_max_length, "tokenizer_max_length"
    if draft.spec is None or length is None:
        return
    if draft.spec.prompt_lengths is None:
        message = f"{draft.spec.title} reads captions of the length that it was trained with"
        yield draft.problem(message, key, fix="remove the key")
        return
    lengths = draft.spec.prompt_lengths
    if length not in lengths:
        allowed = f"{lengths[0]} to {lengths[-1]}" if lengths.step == 1 else ", ".join(map(str, lengths))
        yield draft.problem(f"{length} tokens are no length of {draft.spec.title}", key, allowed)


def family_takes_its_options(draft: Draft) -> Iterator[Problem]:
    for key, (neutral, reason) in (draft.spec.unusable_options if draft.spec else {}).items():
        value = draft.config.values().get(key)
        if value is not None and not is_neutral(value, neutral):
            allowed = f"only {show_value(next((item for item in neutral if item is not None), None))}"
            message = f"{show_value(value)} cannot be used with {draft.config.model.model_family}: {reason}"
            yield draft.problem(message, key, allowed, fix="remove the key")


def prompts_are_encoded_as_the_family_can(draft: Draft) -> Iterator[Problem]:
    spec = draft.spec
    if spec is None:
        return
    for key in PROMPT_OPTIONS:
        value = draft.config.value(key)
        if value != all_options()[key].default and key not in spec.prompt_options:
            message = f"{show_value(value)} has no meaning for {spec.title}"
            reason = spec.other_prompt_options.get(key)
            yield draft.problem(f"{message}: {reason}" if reason else message, key, fix="remove the key")


MODEL_RULES = (
    flavour_belongs_to_the_family,
    a_single_file_is_named_once,
    text_encoders_are_the_family_s,
    prompts_have_a_length_of_the_family,
    family_takes_its_options,
    prompts_are_encoded_as_the_family_can,
)
