"""What must hold between keys: each rule is a function named like a sentence, and all of them are asked.

A rule looks at a draft and yields problems. Rules that need the file system are in `file_rules`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from simpletuner.config.adapter_rules import ADAPTER_NOTICES, ADAPTER_RULES
from simpletuner.config.checking import is_neutral, show_value
from simpletuner.config.dataset_rules import DATASET_NOTICES, DATASET_RULES
from simpletuner.config.datasets import ImageDataset, TextEmbedsDataset
from simpletuner.config.draft import Draft
from simpletuner.config.objective_rules import OBJECTIVE_NOTICES, OBJECTIVE_RULES
from simpletuner.config.optimizer_rules import OPTIMIZER_NOTICES, OPTIMIZER_RULES
from simpletuner.config.options import all_options
from simpletuner.config.options.model import PROMPT_OPTIONS
from simpletuner.config.paths import SINGLE_FILE
from simpletuner.config.precision_rules import PRECISION_RULES
from simpletuner.config.process_rules import PROCESS_RULES
from simpletuner.config.validation_rules import VALIDATION_NOTICES, VALIDATION_RULES
from simpletuner.errors import Problem
from simpletuner.spelling import did_you_mean
from simpletuner.text import has_control, printable

Rule = Callable[[Draft], Iterator[Problem]]
Notice = Callable[[Draft], Iterator[str]]

_REPOSITORY = re.compile(r"(?:\w[\w.-]*/)?\w(?:[\w.-]*\w)?", re.ASCII)

# In the unit of `area`: larger numbers are pixels by mistake.
MAX_MEGAPIXELS = 20


def exactly_one_length_is_set(draft: Draft) -> Iterator[Problem]:
    steps, epochs = draft.config.training.max_train_steps, draft.config.training.num_train_epochs
    if steps > 0 and epochs > 0:
        message = f"{steps} steps and {epochs:g} epochs (num_train_epochs) are both set"
        yield draft.problem(message, "max_train_steps", fix="set one of them to 0")
    if steps == 0 and epochs == 0:
        allowed = "exactly one of max_train_steps and num_train_epochs above 0"
        yield draft.problem("the run has no length", "max_train_steps", allowed, fix="set max_train_steps")


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


def regularisation_has_an_adapter(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        if entry.is_regularisation_data and draft.config.model.model_type == "full":
            message = "prior preservation compares with the model without its adapter, and model_type is full"
            yield draft.dataset_problem(entry, "is_regularisation_data", message, fix="set it to false")
        if entry.is_regularisation_data and entry.dataset_type == "eval":
            message = "an eval dataset is never trained on"
            yield draft.dataset_problem(entry, "is_regularisation_data", message, fix="set it to false")


def a_falling_schedule_falls(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    falls = config.optimizer.lr_scheduler not in ("constant", "constant_with_warmup")
    if falls and config.optimizer.lr_end > config.optimizer.learning_rate and not config.optimizer.lr_scale:
        message = f"{config.optimizer.lr_end:g} is not below learning_rate, which is {config.optimizer.learning_rate:g}"
        fix = f"set lr_end below it, or lr_scheduler to constant instead of {config.optimizer.lr_scheduler}"
        yield draft.problem(message, "lr_end", f"less than {config.optimizer.learning_rate:g}", fix)


def trackers_are_not_contradictory(draft: Draft) -> Iterator[Problem]:
    trackers = draft.config.reporting.report_to
    if "none" in trackers and len(trackers) > 1:
        yield draft.problem(f"{', '.join(trackers)}: none and another one", "report_to", "none, or the others")


def a_custom_tracker_has_its_class(draft: Draft) -> Iterator[Problem]:
    name, trackers = draft.config.reporting.custom_tracker, draft.config.reporting.report_to
    form = "package.module:Class"
    if "custom-tracker" in trackers and name is None:
        yield draft.problem("is missing: report_to names custom-tracker", "custom_tracker", form, fix="set it")
    if name is not None and not {"custom-tracker", "all"} & set(trackers):
        message = f'"{name}" has no use: report_to does not name custom-tracker'
        yield draft.problem(message, "custom_tracker", fix='add custom-tracker to "report_to", or remove the key')
    if name is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", name):
        yield draft.problem(f'"{name}" does not name a class', "custom_tracker", form)


def alignment_fits_the_family(draft: Draft) -> Iterator[Problem]:
    alignment = draft.config.data.aspect_bucket_alignment
    if draft.spec and alignment and alignment % draft.spec.size_multiple:
        multiple = draft.spec.size_multiple
        message = f"{alignment} is not a multiple of {multiple}, which {draft.spec.title} needs"
        yield draft.problem(message, "aspect_bucket_alignment", f"a multiple of {multiple}")


def validation_sizes_fit_the_family(draft: Draft) -> Iterator[Problem]:
    spec = draft.spec
    for size in draft.config.validation.validation_sizes if spec and spec.max_size else ():
        if spec and spec.max_size and max(size) > spec.max_size:
            message = f"{size} is larger than {spec.title} takes"
            yield draft.problem(message, "validation_resolution", f"at most {spec.max_size} pixels a side")


def resolution_fits_the_family(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        resolution, unit = entry.resolution, entry.resolution_type
        if resolution is None:
            message = f'is missing; that of config.json is of another resolution_type than "{unit}"'
            yield draft.dataset_problem(entry, "resolution", message, fix="set it in the entry")
            continue
        if unit == "area":
            if resolution > MAX_MEGAPIXELS:
                message = f"{resolution:g} megapixels are not an image size"
                fix = 'for pixels set resolution_type to "pixel_area"'
                yield draft.dataset_problem(entry, "resolution", message, f"at most {MAX_MEGAPIXELS}", fix)
            continue
        if resolution != int(resolution):
            message = f"{resolution:g} is not a whole number of pixels"
            fix = 'for megapixels set resolution_type to "area"'
            yield draft.dataset_problem(entry, "resolution", message, "a whole number", fix)
            continue
        yield from _sides_fit(draft, entry, resolution)


def _sides_fit(draft: Draft, entry: ImageDataset, resolution: float) -> Iterator[Problem]:
    if draft.spec is None:
        return
    smallest, largest = draft.spec.size_multiple, draft.spec.max_size
    if resolution < smallest or (largest and resolution > largest):
        allowed = f"{smallest} to {largest} pixels" if largest else f"at least {smallest} pixels"
        message = f"{resolution:g} pixels are outside of what {draft.spec.title} takes"
        fix = 'for megapixels set resolution_type to "area"' if resolution < smallest else None
        yield draft.dataset_problem(entry, "resolution", message, allowed, fix)


def size_limits_go_together(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        smallest, largest, target = entry.minimum_image_size, entry.maximum_image_size, entry.target_downsample_size
        if largest is not None and target is None:
            message = "is missing: maximum_image_size is set, and larger images need a size to go to"
            yield draft.dataset_problem(entry, "target_downsample_size", message, fix="set it, or remove the other")
        if target is not None and largest is None:
            message = "has no effect without maximum_image_size"
            yield draft.dataset_problem(entry, "target_downsample_size", message, fix="set both, or none")
        if largest is not None and target is not None and target > largest:
            message = f"{target:g} is above maximum_image_size, which is {largest:g}"
            yield draft.dataset_problem(entry, "target_downsample_size", message, f"at most {largest:g}")
        if smallest is not None and largest is not None and smallest > largest:
            message = f"{smallest:g} is above maximum_image_size, which is {largest:g}: no image would be left"
            yield draft.dataset_problem(entry, "minimum_image_size", message, f"at most {largest:g}")


def captions_have_their_source(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        prompts = [prompt for prompt in entry.instance_prompt or () if prompt.strip()]
        if prompts:
            continue
        wanted = [name for name in ("only_instance_prompt", "prepend_instance_prompt") if getattr(entry, name)] + (
            [f"caption_strategy {entry.caption_strategy}"] if entry.caption_strategy == "instanceprompt" else []
        )
        wanted += ["caption_fallback instanceprompt"] if entry.caption_fallback == "instanceprompt" else []
        if wanted:
            message = f"is missing: {wanted[0]} needs it"
            yield draft.dataset_problem(entry, "instance_prompt", message, "a text, or a list of texts")


def dataset_ids_are_names(draft: Draft) -> Iterator[Problem]:
    for entry in draft.datasets.entries:
        is_name = entry.id.strip() == entry.id and not set(entry.id) & set('/\\:*?"<>|') and entry.id.isprintable()
        if not is_name or entry.id.startswith(".") or len(entry.id) > 100:
            message = f'"{printable(entry.id)}" cannot name a file'
            yield draft.dataset_problem(entry, "id", message, 'up to 100 letters, without / \\ : * ? " < > |')


def names_stand_on_one_line(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    for key in ("tracker_run_name", "tracker_project_name", "output_dir"):
        if (name := config.value(key)) is not None and has_control(str(name)):
            yield draft.problem(f'"{printable(str(name))}" holds a control character', key, "text on one line")


def there_are_images_to_train_on(draft: Draft) -> Iterator[Problem]:
    if draft.datasets.problems or not draft.datasets.is_read:
        return
    if any(entry.dataset_type == "image" for entry in draft.datasets.entries):
        return
    disabled = f" ({', '.join(draft.datasets.disabled)} disabled)" if draft.datasets.disabled else ""
    message = f"names no dataset of dataset_type image{disabled}: there is nothing to train on"
    file = draft.config.data.data_backend_config
    shown = draft.folders.shown(file) if file else None
    yield Problem(message, file=shown, line=1, fix="add an entry with id and instance_data_dir")


def one_text_cache_is_the_default(draft: Draft) -> Iterator[Problem]:
    defaults = [entry for entry in draft.datasets.entries if isinstance(entry, TextEmbedsDataset) and entry.default]
    for entry in defaults[1:]:
        message = f'"{defaults[0].id}" is the default already'
        yield draft.dataset_problem(entry, "default", message, "true in one text_embeds entry")


def uploads_have_their_place(draft: Draft) -> Iterator[Problem]:
    config = draft.config
    if config.reporting.push_checkpoints_to_hub and not config.reporting.push_to_hub:
        message = "has no effect without push_to_hub"
        yield draft.problem(message, "push_checkpoints_to_hub", fix="set push_to_hub too, or remove the key")
    name = config.reporting.hub_model_id
    if name is not None and (not _REPOSITORY.fullmatch(name) or "--" in name or ".." in name or len(name) > 96):
        message = f'"{name}" cannot name a repository on the Hub'
        yield draft.problem(message, "hub_model_id", "name or owner/name, of letters, digits, - _ and .")


RULES: tuple[Rule, ...] = (
    uploads_have_their_place,
    exactly_one_length_is_set,
    flavour_belongs_to_the_family,
    a_single_file_is_named_once,
    text_encoders_are_the_family_s,
    prompts_have_a_length_of_the_family,
    family_takes_its_options,
    prompts_are_encoded_as_the_family_can,
    *ADAPTER_RULES,
    regularisation_has_an_adapter,
    a_falling_schedule_falls,
    trackers_are_not_contradictory,
    a_custom_tracker_has_its_class,
    alignment_fits_the_family,
    validation_sizes_fit_the_family,
    resolution_fits_the_family,
    size_limits_go_together,
    captions_have_their_source,
    dataset_ids_are_names,
    names_stand_on_one_line,
    there_are_images_to_train_on,
    one_text_cache_is_the_default,
    *OBJECTIVE_RULES,
    *DATASET_RULES,
    *PROCESS_RULES,
    *VALIDATION_RULES,
    *OPTIMIZER_RULES,
    *PRECISION_RULES,
)


def warm_up_is_shorter_than_the_run(draft: Draft) -> Iterator[str]:
    steps, options = draft.config.training.max_train_steps, draft.config.optimizer
    if 0 < steps <= options.lr_warmup_steps:
        yield (
            f"{draft.origin('lr_warmup_steps')}: lr_warmup_steps: {options.lr_warmup_steps} steps of warm-up in a "
            f"run of {steps}: the learning rate never reaches {options.learning_rate:g}"
        )


def dropped_captions_serve_guidance(draft: Draft) -> Iterator[str]:
    if draft.config.training.caption_dropout_probability == 0 and "caption_dropout_probability" in draft.origins:
        yield (
            f"{draft.origin('caption_dropout_probability')}: caption_dropout_probability: 0 never trains the empty "
            "caption that guidance uses; long runs do better with 0.05 to 0.1"
        )


def text_caches_have_a_use(draft: Draft) -> Iterator[str]:
    if draft.spec is None or draft.spec.caches_prompt_embeds:
        return
    for entry in draft.datasets.entries:
        if isinstance(entry, TextEmbedsDataset) and not entry.caption_filter_list:
            place = draft.datasets.place(entry.id, "dataset_type")
            reads = f"{draft.spec.title} reads the tokens of captions"
            yield f"{place}: {entry.id}: a text_embeds entry has no use: {reads}, and nothing is kept there"
    for key in ("text_cache_ondemand", "text_cache_disable", "text_encoder_offload"):
        if draft.config.value(key):
            yield f"{draft.origin(key)}: {key} has no use: {draft.spec.title} reads the tokens of captions"


def webhook_intervals_have_a_webhook(draft: Draft) -> Iterator[str]:
    if draft.config.reporting.webhook_reporting_interval and draft.config.reporting.webhook_config is None:
        key = "webhook_reporting_interval"
        yield f"{draft.origin(key)}: {key}: there is no webhook_config, so nothing is reported"


NOTICES: tuple[Notice, ...] = (
    warm_up_is_shorter_than_the_run,
    dropped_captions_serve_guidance,
    text_caches_have_a_use,
    webhook_intervals_have_a_webhook,
    *ADAPTER_NOTICES,
    *OBJECTIVE_NOTICES,
    *DATASET_NOTICES,
    *VALIDATION_NOTICES,
    *OPTIMIZER_NOTICES,
)


def broken_rules(draft: Draft) -> list[Problem]:
    """The problems of all rules, but for options whose value was refused already."""
    problems = [problem for rule in RULES for problem in rule(draft)]
    return [problem for problem in problems if problem.key not in draft.faulty]


def notices(draft: Draft) -> list[str]:
    """What is allowed but perhaps not meant; each is said once."""
    return [line for notice in NOTICES for line in notice(draft)]
