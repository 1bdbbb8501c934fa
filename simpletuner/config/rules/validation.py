"""What must hold between the keys of validation and evaluation: rules and notices in the form of `rules.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from simpletuner.config.draft import Draft
from simpletuner.config.options import all_options
from simpletuner.config.values import parse_sizes
from simpletuner.errors import Problem

# Option -> argument of a pipeline that not every family's has.
PIPELINE_OPTIONS: Mapping[str, str] = {
    "validation_guidance_rescale": "guidance_rescale",
    "validation_guidance_real": "true_cfg_scale",
    "validation_guidance_image": "img_guidance_scale",
    "validation_guidance_skip_layers": "skip_guidance_layers",
}
_NEUTRAL = {
    "validation_guidance_rescale": 0,
    "validation_guidance_real": 1,
    "validation_guidance_image": None,
    "validation_guidance_skip_layers": None,
}


def generates_images(draft: Draft) -> bool:
    """Whether the trainer generates any validation image of its own."""
    config = draft.config
    has_prompt = (
        config.validation.validation_prompt or draft.prompt_library or config.validation.validation_prompt_library
    )
    is_asked = bool(has_prompt) or not config.validation.validation_disable_unconditional
    return (
        is_asked
        and not config.validation.validation_disable
        and config.validation.validation_method == "simpletuner-local"
    )


def pipeline_takes_its_options(draft: Draft) -> Iterator[Problem]:
    spec = draft.spec
    if spec is None:
        return
    for key, argument in PIPELINE_OPTIONS.items():
        value = draft.config.value(key)
        if value != _NEUTRAL[key] and argument not in spec.pipeline_options:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}"
            neutral = "nothing" if _NEUTRAL[key] is None else f"only {_NEUTRAL[key]}"
            message = f"{shown} cannot be used: the pipeline of {spec.title} has no {argument}"
            yield draft.problem(message, key, neutral, fix="remove the key")
    if "guidance_rescale" not in spec.pipeline_options and draft.config.validation.user_prompt_library is not None:
        for nickname, prompt in (draft.prompt_library or {}).items():
            if prompt.guidance_rescale:
                message = f"cannot be used: the pipeline of {spec.title} has no guidance_rescale"
                file = draft.folders.shown(draft.config.validation.user_prompt_library)
                yield Problem(message, key=f"{nickname}.guidance_rescale", file=file, fix="remove it")


def skipped_layers_lead_somewhere(draft: Draft) -> Iterator[Problem]:
    """Guidance by skipped layers acts beside ordinary guidance, in the steps between start and stop."""
    config, key = draft.config, "validation_guidance_skip_layers"
    layers = config.validation.validation_guidance_skip_layers
    if layers is None:
        for other in (f"{key}_start", f"{key}_stop", "validation_guidance_skip_scale"):
            if config.value(other) != all_options()[other].default:
                fix = f"set {key}, or remove the key"
                yield draft.problem(f"has no use without {key}", other, fix=fix)
        return
    steps = config.validation.validation_num_inference_steps
    start, stop = (steps * config.value(f"{key}_{end}") for end in ("start", "stop"))
    if not any(start < step < stop for step in range(steps)):
        message = f"no sampling step of {steps} lies between start and stop, so nothing would be skipped"
        yield draft.problem(message, f"{key}_stop", fix=f"raise {key}_stop, or remove {key}")


def references_are_taken(draft: Draft) -> Iterator[Problem]:
    spec = draft.spec
    if spec is None:
        return
    most = spec.max_references
    takes = f"at most {most}" if most else "none"
    asked = draft.config.validation.validation_references or ()
    if len(asked) > most:
        message = f"{len(asked)} reference images cannot be used: {spec.title} takes {most or 'none'}"
        yield draft.problem(message, "validation_references", takes, fix="remove the key" if not most else None)
    for nickname, prompt in (draft.prompt_library or {}).items():
        if len(prompt.references or ()) > most and draft.config.validation.user_prompt_library is not None:
            message = f"{len(prompt.references or ())} reference images cannot be used: {spec.title} takes {takes}"
            file = draft.folders.shown(draft.config.validation.user_prompt_library)
            yield Problem(message, key=f"{nickname}.references", file=file, allowed=takes)


def flow_families_keep_their_sampler(draft: Draft) -> Iterator[Problem]:
    spec, name = draft.spec, draft.config.validation.validation_noise_scheduler
    if spec and name and spec.prediction_type == "flow" and "validation_noise_scheduler" not in spec.unusable_options:
        message = f"{name} cannot be used: {spec.title} is a flow model, and its pipeline sets the times of its own"
        yield draft.problem(message, "validation_noise_scheduler", fix="remove the key")


def library_sizes_fit_the_family(draft: Draft) -> Iterator[Problem]:
    limit = draft.spec.max_size if draft.spec else None
    library = draft.config.validation.user_prompt_library
    if limit is None or library is None:
        return
    for nickname, prompt in (draft.prompt_library or {}).items():
        for size in parse_sizes(prompt.resolution) if prompt.resolution else ():
            if max(size) > limit:
                message = f"{size} is larger than {draft.spec.title if draft.spec else 'the family'} takes"
                file, allowed = draft.folders.shown(library), f"at most {limit} pixels a side"
                yield Problem(message, key=f"{nickname}.resolution", file=file, allowed=allowed)


def adapter_strength_has_an_adapter(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.model.model_type != "full":
        return
    message = "cannot be used: model_type is full, and there is no adapter"
    if config.validation.validation_lycoris_strength != 1:
        yield draft.problem(message, "validation_lycoris_strength", "only 1", fix="remove the key")
    for nickname, prompt in (draft.prompt_library or {}).items():
        if prompt.adapter_strength not in (None, 1) and config.validation.user_prompt_library is not None:
            file = draft.folders.shown(config.validation.user_prompt_library)
            yield Problem(message, key=f"{nickname}.adapter_strength", file=file, fix="remove it")


def previews_have_images(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if not config.validation.validation_preview:
        return
    if not generates_images(draft):
        message = "there is no image to preview: validation generates none"
        fix = "set validation_prompt, or remove the key"
        yield draft.problem(message, "validation_preview", fix=fix)
    steps, every = config.validation.validation_num_inference_steps, config.validation.validation_preview_steps
    if every > steps:
        message = f"{every} is more than the {steps} steps of an image: none would be shown"
        yield draft.problem(message, "validation_preview_steps", f"1 to {steps}")


def scores_have_images(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.evaluation.evaluation_type != "none" and not generates_images(draft):
        message = f"{config.evaluation.evaluation_type} scores validation images, and validation generates none"
        yield draft.problem(message, "evaluation_type", fix="set validation_prompt, or remove the key")
    if (
        config.evaluation.evaluation_type == "none"
        and config.evaluation.pretrained_evaluation_model_name_or_path is not None
    ):
        message = "has no use: evaluation_type is none"
        key = "pretrained_evaluation_model_name_or_path"
        yield draft.problem(message, key, fix='set evaluation_type to "clip", or remove the key')


def external_script_is_named(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    is_external = config.validation.validation_method == "external-script"
    if is_external and not config.validation.validation_external_script:
        message = "is missing: validation_method is external-script"
        yield draft.problem(message, "validation_external_script", "a command line")
    if config.validation.validation_external_script and not is_external:
        message = "has no use: validation_method is simpletuner-local"
        fix = 'set validation_method to "external-script", or remove the key'
        yield draft.problem(message, "validation_external_script", fix=fix)


def has_eval_images(draft: Draft) -> bool:
    """Whether there is something to compute an eval loss on."""
    return bool(draft.config.evaluation.eval_holdout) or any(e.dataset_type == "eval" for e in draft.datasets.entries)


def computes_eval_loss(draft: Draft) -> bool:
    """Whether an eval loss will be computed."""
    return draft.config.evaluation.has_interval and has_eval_images(draft)


def eval_dataset_exists(draft: Draft) -> Iterator[Problem]:
    wanted = draft.config.evaluation.eval_dataset_id
    if wanted is None or not draft.datasets.is_read or draft.datasets.problems:
        return
    known = [entry.id for entry in draft.datasets.entries if entry.dataset_type == "eval"]
    if wanted not in known:
        message = f'there is no enabled dataset "{wanted}" of dataset_type eval'
        yield draft.problem(message, "eval_dataset_id", ", ".join(known) or "none: there is no eval dataset")


def holdout_is_instead_of_an_eval_dataset(draft: Draft) -> Iterator[Problem]:
    given = [entry.id for entry in draft.datasets.entries if entry.dataset_type == "eval"]
    if draft.config.evaluation.eval_holdout and given:
        message = f'there is an eval dataset already ("{given[0]}")'
        yield draft.problem(message, "eval_holdout", "0 where there is an eval dataset", "remove one of them")


def what_follows_the_eval_loss_has_one(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if computes_eval_loss(draft) or not draft.datasets.is_read or draft.datasets.problems:
        return
    fix = "set eval_steps_interval and add a dataset of dataset_type eval (or set eval_holdout), or remove the key"
    if config.evaluation.checkpoint_keep_best:
        yield draft.problem("no eval loss is computed, so no checkpoint is best", "checkpoint_keep_best", fix=fix)
    if config.evaluation.early_stopping_patience is not None:
        yield draft.problem("no eval loss is computed, so nothing can stop falling", "early_stopping_patience", fix=fix)


def validation_sizes_fit_the_family(draft: Draft) -> Iterator[Problem]:
    spec = draft.spec
    for size in draft.config.validation.validation_sizes if spec and spec.max_size else ():
        if spec and spec.max_size and max(size) > spec.max_size:
            message = f"{size} is larger than {spec.title} takes"
            yield draft.problem(message, "validation_resolution", f"at most {spec.max_size} pixels a side")


VALIDATION_RULES = (
    validation_sizes_fit_the_family,
    pipeline_takes_its_options,
    skipped_layers_lead_somewhere,
    references_are_taken,
    flow_families_keep_their_sampler,
    library_sizes_fit_the_family,
    adapter_strength_has_an_adapter,
    previews_have_images,
    scores_have_images,
    external_script_is_named,
    eval_dataset_exists,
    holdout_is_instead_of_an_eval_dataset,
    what_follows_the_eval_loss_has_one,
)


def eval_intervals_have_images(draft: Draft) -> Iterator[str]:
    options, has_images = draft.config.evaluation, has_eval_images(draft)
    if options.has_interval and not has_images and draft.datasets.is_read:
        key = "eval_steps_interval" if options.eval_steps_interval else "eval_epoch_interval"
        yield f"{draft.origin(key)}: {key}: there is no dataset of dataset_type eval, so no eval loss is computed"
    if has_images and not options.has_interval and not options.eval_loss_disable:
        held_out = f"{draft.origin('eval_holdout')}: eval_holdout"
        what = held_out if options.eval_holdout else "there is an eval dataset"
        yield f"{what}, but no eval_steps_interval or eval_epoch_interval: no eval loss is computed"


def validation_has_prompts(draft: Draft) -> Iterator[str]:
    config = draft.config
    has_interval = config.validation.validation_step_interval or config.validation.validation_epoch_interval
    is_own = config.validation.validation_method == "simpletuner-local" and not config.validation.validation_disable
    if has_interval and is_own and not generates_images(draft):
        yield "there is no validation_prompt and no user_prompt_library: no validation images are made"


def skipped_layers_have_guidance(draft: Draft) -> Iterator[str]:
    key = "validation_guidance_skip_layers"
    if (
        draft.config.validation.validation_guidance_skip_layers is not None
        and draft.config.validation.validation_guidance <= 1
    ):
        yield f"{draft.origin(key)}: {key} has no effect: validation_guidance is not above 1, so no layer is skipped"


VALIDATION_NOTICES = (skipped_layers_have_guidance, eval_intervals_have_images, validation_has_prompts)
