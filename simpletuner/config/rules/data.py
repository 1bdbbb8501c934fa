"""What must hold within and between the entries of the data file: schedules, masks, captions, caches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from simpletuner.config.caption_filters import parse_filter
from simpletuner.config.datasets import (
    ConditioningDataset,
    EvalDataset,
    ImageDataset,
    TextEmbedsDataset,
    conditioning_for,
    filters_for,
    masks_for,
    references_for,
    text_cache_entry,
)
from simpletuner.config.draft import Draft
from simpletuner.config.sources import caption_fault
from simpletuner.errors import Problem
from simpletuner.text import printable

# Keys that say how an entry is trained on; an eval dataset never is.
TRAINING_KEYS = (
    *("random_flip", "probability", "start_epoch", "end_epoch", "start_step", "end_step", "train_batch_size"),
    *("caption_shuffle", "vae_cache_clear_each_epoch", "with_replacement"),
)


def crops_have_their_shapes(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        buckets = entry.crop_aspect_buckets or ()
        if entry.crop and entry.crop_aspect in ("closest", "random") and not buckets:
            message = f"is missing: crop_aspect {entry.crop_aspect} chooses from it"
            yield draft.dataset_problem(entry, "crop_aspect_buckets", message, "a list such as [1.0, 0.75, 1.5]")
        if buckets and not any(bucket.weight for bucket in buckets):
            message = "gives every aspect ratio the weight 0"
            yield draft.dataset_problem(entry, "crop_aspect_buckets", message, "a weight above 0")
        if entry.crop_aspect != "random" and any(bucket.weight != 1 for bucket in buckets):
            message = f"has weights, which crop_aspect {entry.crop_aspect} does not sample by"
            yield draft.dataset_problem(entry, "crop_aspect_buckets", message, fix="set crop_aspect to random")


def own_sizes_are_not_cut(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        if not entry.enlarge and entry.crop and entry.type != "records":
            message = "false keeps the sizes of images, and crop cuts them to one shape"
            yield draft.dataset_problem(entry, "enlarge", message, fix="set crop to false, or remove the key")
        if entry.enlarge and entry.maximum_side is not None and entry.type != "records":
            message = f"{entry.maximum_side} limits images that keep their own size, and these are enlarged"
            yield draft.dataset_problem(entry, "maximum_side", message, fix="set enlarge to false, or remove the key")


# Keys of datasets whose images are cut or chosen by folder.
NOT_OF_RECORDS = {
    **dict.fromkeys(
        ("crop", "crop_aspect", "crop_style", "crop_aspect_buckets", "maximum_image_size", "target_downsample_size"),
        "targets keep their shape, as their references do",
    ),
    "conditioning_data": "the rows name their references",
    "max_num_samples": "the table says which rows there are",
}


def records_have_keys_of_their_own(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        if entry.type != "records":
            continue
        for key, reason in NOT_OF_RECORDS.items():
            is_written = (entry.id, key) in draft.datasets.origins
            if is_written and getattr(entry, key) not in (None, False):
                yield draft.dataset_problem(entry, key, f"cannot be used with records: {reason}", fix="remove the key")
        for own, other in (("max_output_pixels", "resolution"), ("max_side_length", "maximum_side")):
            if getattr(entry, own) is not None and (entry.id, other) in draft.datasets.origins:
                message = f"{other} is written too, and both say how large a target may be"
                yield draft.dataset_problem(entry, own, message, fix="keep one of them")


def aspect_limits_go_together(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        narrowest, widest = entry.minimum_aspect_ratio, entry.maximum_aspect_ratio
        if narrowest is not None and widest is not None and narrowest > widest:
            message = f"{narrowest:g} is above maximum_aspect_ratio, which is {widest:g}: no image would be left"
            yield draft.dataset_problem(entry, "minimum_aspect_ratio", message, f"at most {widest:g}")


def eval_datasets_are_not_trained_on(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        if isinstance(entry, EvalDataset):
            for key in TRAINING_KEYS:
                is_written = (entry.id, key) in draft.datasets.origins  # else it comes from config.json
                if is_written and getattr(entry, key) not in (type(entry).model_fields[key].default, 0):
                    message = "an eval dataset is never trained on"
                    yield draft.dataset_problem(entry, key, message, fix="remove the key")


def schedules_end_after_they_start(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        for start, end in (("start_epoch", "end_epoch"), ("start_step", "end_step")):
            first, last = getattr(entry, start), getattr(entry, end)
            if last and last < first:
                message = f"{last} is before {start}, which is {first}"
                yield draft.dataset_problem(entry, end, message, f"at least {first}, or 0 for no end")


def some_dataset_takes_part_at_any_time(draft: Draft) -> Iterator[Problem]:
    entries = [entry for entry in draft.images if not isinstance(entry, EvalDataset)]
    if not entries:
        return
    if not any(entry.probability for entry in entries):
        yield draft.dataset_problem(
            entries[0], "probability", "no dataset has one above 0: there is nothing to train on"
        )
        return
    used = [entry for entry in entries if entry.probability]
    steps, epochs = draft.config.training.max_train_steps, draft.config.training.num_train_epochs
    for unit, length in (("step", steps), ("epoch", epochs)):
        ranges = [(entry, getattr(entry, f"start_{unit}"), getattr(entry, f"end_{unit}")) for entry in used]
        gap = _first_gap([(start, end) for _, start, end in ranges], length)
        if gap is not None:
            entry = next((each for each, start, _ in ranges if start > gap), ranges[0][0])
            key = f"start_{unit}" if getattr(entry, f"start_{unit}") > gap else f"end_{unit}"
            message = f"no dataset takes part in {unit} {gap}"
            yield draft.dataset_problem(entry, key, message, fix="let the ranges of the datasets join without a gap")


def something_new_is_learned(draft: Draft) -> Iterator[Problem]:
    used = [entry for entry in draft.images if not isinstance(entry, EvalDataset) and entry.probability]
    starts_as_base = draft.config.model.model_type == "lora" and not draft.config.adapter.init_lora
    if starts_as_base and used and all(entry.is_regularisation_data for entry in used):
        message = (
            "all datasets are regularization data, whose target is what the base model predicts: the loss would be 0"
        )
        fix = "add a dataset to learn from, or set it to false"
        yield draft.dataset_problem(used[0], "is_regularisation_data", message, fix=fix)


def _first_gap(ranges: Iterable[tuple[int, int | None]], length: float) -> int | None:
    """The first number of 1 .. length that no range holds; a range without an end goes on for ever."""
    reached = 0
    for start, end in sorted(ranges, key=lambda each: each[0]):
        if start > reached + 1:
            break
        if not end:
            return None
        reached = max(reached, end)
    return reached + 1 if reached < length else None


def epochs_have_a_length(draft: Draft) -> Iterator[Problem]:
    if not draft.config.training.num_train_epochs:
        return
    for entry in draft.images:
        for key in ("start_step", "end_step"):
            if (getattr(entry, key) or 0) > 1:
                message = "makes epochs longer or shorter on the way, and num_train_epochs says how long the run is"
                yield draft.dataset_problem(
                    entry, key, message, fix="set max_train_steps, or start_epoch and end_epoch"
                )


def conditioning_belongs_to_images(draft: Draft) -> Iterator[Problem]:
    entries = draft.datasets.entries
    conditioning = {entry.id for entry in entries if isinstance(entry, ConditioningDataset)}
    if draft.datasets.problems:
        return
    for entry in draft.images:
        for name in entry.conditioning_data or ():
            if name not in conditioning:
                message = f'"{name}" is not a dataset of dataset_type conditioning'
                allowed = ", ".join(sorted(conditioning)) or "the id of one; there is none"
                yield draft.dataset_problem(entry, "conditioning_data", message, allowed)
        masks = masks_for(entry, entries)
        if len(masks) > 1:
            message = f"{' and '.join(mask.id for mask in masks)} both hold masks of this dataset"
            yield draft.dataset_problem(entry, "conditioning_data", message, "one")
        if masks and isinstance(entry, EvalDataset):
            message = f"{masks[0].id} holds masks; an eval dataset is never trained on"
            yield draft.dataset_problem(entry, "conditioning_data", message, fix="remove the masks")
    images = {entry.id for entry in draft.images}
    for each in entries:
        source = each.source_dataset_id if isinstance(each, ConditioningDataset) else None
        if source and source not in images:
            message = f'"{source}" is not a dataset of dataset_type image or eval'
            yield draft.dataset_problem(each, "source_dataset_id", message, ", ".join(sorted(images)))


def references_fit_the_family(draft: Draft) -> Iterator[Problem]:
    if draft.spec is None:
        return
    most, title = draft.spec.max_references, draft.spec.title
    for entry in draft.images:
        references = references_for(entry, draft.datasets.entries)
        if not references:
            continue
        first = references[0]
        key = "conditioning_type" if first.source_dataset_id == entry.id else "conditioning_data"
        place = first if key == "conditioning_type" else entry
        if most == 0:
            message = f"{first.id} holds reference images, and {title} takes none"
            yield draft.dataset_problem(place, key, message, fix="remove the entry, or choose a family that edits")
        elif len(references) > most and draft.config.data.conditioning_multidataset_sampling == "combined":
            names = ", ".join(each.id for each in references)
            message = f"{names} give each image {len(references)} references; {title} takes {most}"
            fix = "name fewer, or set conditioning_multidataset_sampling to random"
            yield draft.dataset_problem(place, key, message, f"at most {most}", fix)


def captions_fit_their_source(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        fault = caption_fault(entry, entry.caption_strategy)
        if fault is not None:
            yield draft.dataset_problem(entry, fault.key, fault.message, fault.allowed)
        if entry.metadata_backend == "huggingface" and entry.type != "huggingface":
            message = f'"huggingface" has no use with type {entry.type}'
            yield draft.dataset_problem(entry, "metadata_backend", message, "discovery")


def a_fallback_has_its_use(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        strategy, fallback = entry.caption_strategy, entry.caption_fallback
        if fallback is None:
            continue
        if entry.only_instance_prompt or strategy == "instanceprompt":
            message = "has no use: all images have instance_prompt as their caption"
            yield draft.dataset_problem(entry, "caption_fallback", message, fix="remove it, or change caption_strategy")
        elif strategy == fallback:
            message = "has no use: it is the caption_strategy"
            yield draft.dataset_problem(entry, "caption_fallback", message, "instanceprompt, or no such key")


def tables_have_their_strategy(draft: Draft) -> Iterator[Problem]:
    # Which of the keys of tables the rows of a type are read with.
    used = {"csv": ("filename_column",), "huggingface": ("caption_column",)}
    for entry in draft.images:
        if entry.has_caption_table:
            continue
        for key in ("metadata_file", "filename_column", "caption_column"):
            if key in used.get(entry.type, ()):
                continue
            if getattr(entry, key) != type(entry).model_fields[key].default:
                message = f"has no use: caption_strategy is {entry.caption_strategy}, and type {entry.type}"
                yield draft.dataset_problem(entry, key, message, fix="set caption_strategy to csv or parquet")


def embeddings_of_files_stand_for_captions(draft: Draft) -> Iterator[Problem]:
    key = "prompt_embeds_column"
    for entry in draft.images:
        if entry.dropped_prompt_embeds_column and not entry.prompt_embeds_column:
            message = f"has no use without {key}"
            yield draft.dataset_problem(entry, "dropped_prompt_embeds_column", message, fix=f"add {key}")
        if not entry.prompt_embeds_column:
            continue
        if draft.spec and not draft.spec.prompt_tensors:
            message = f"files of embeddings are not read for {draft.spec.title}"
            yield draft.dataset_problem(entry, key, message, fix="remove the key")
        if not (entry.has_caption_table or entry.type == "records"):
            message = f"is a column of a table, and caption_strategy is {entry.caption_strategy}, type {entry.type}"
            yield draft.dataset_problem(entry, key, message, fix="set caption_strategy to csv or parquet")
        changed = {
            "caption_shuffle": entry.caption_shuffle,
            "prepend_instance_prompt": entry.prepend_instance_prompt,
            "only_instance_prompt": entry.only_instance_prompt,
            "caption_fallback": entry.caption_fallback,
            "caption_openers": entry.caption_openers,
            "caption_filter_list of the text_embeds entry": filters_for(draft.datasets.entries),
        }
        for name in (name for name, value in changed.items() if value):
            message = f"the embeddings are those of captions as they are, and {name} changes captions"
            yield draft.dataset_problem(entry, key, message, fix=f"remove {name}, or this key")


def caption_filters_can_be_read(draft: Draft) -> Iterator[Problem]:
    texts = [entry for entry in draft.datasets.entries if isinstance(entry, TextEmbedsDataset)]
    used = filters_for(texts)
    for entry in texts:
        if entry.caption_filter_list and used is not entry.caption_filter_list:
            message = "has no use: only the filters of the default entry are applied"
            yield draft.dataset_problem(entry, "caption_filter_list", message, fix="move it to the default entry")
        for text in entry.caption_filter_list or ():
            try:
                parse_filter(text)
            except ValueError as error:
                yield draft.dataset_problem(entry, "caption_filter_list", str(error))


def captions_are_kept_in_the_default_cache(draft: Draft) -> Iterator[Problem]:
    cache = text_cache_entry(draft.datasets.entries)
    for entry in draft.images:
        if entry.text_embeds and (cache is None or entry.text_embeds != cache.id):
            message = f'"{entry.text_embeds}" is not the text_embeds entry that all captions are kept in'
            allowed = cache.id if cache else "the id of the default text_embeds entry; there is none"
            yield draft.dataset_problem(entry, "text_embeds", message, allowed, fix="remove the key")


def regularisation_has_an_adapter(draft: Draft) -> Iterator[Problem]:
    for entry in draft.images:
        if entry.is_regularisation_data and draft.config.model.model_type == "full":
            message = "prior preservation compares with the model without its adapter, and model_type is full"
            yield draft.dataset_problem(entry, "is_regularisation_data", message, fix="set it to false")
        if entry.is_regularisation_data and entry.dataset_type == "eval":
            message = "an eval dataset is never trained on"
            yield draft.dataset_problem(entry, "is_regularisation_data", message, fix="set it to false")


def dataset_ids_are_names(draft: Draft) -> Iterator[Problem]:
    for entry in draft.datasets.entries:
        is_name = entry.id.strip() == entry.id and not set(entry.id) & set('/\\:*?"<>|') and entry.id.isprintable()
        if not is_name or entry.id.startswith(".") or len(entry.id) > 100:
            message = f'"{printable(entry.id)}" cannot name a file'
            yield draft.dataset_problem(entry, "id", message, 'up to 100 letters, without / \\ : * ? " < > |')


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


DATASET_RULES = (
    regularisation_has_an_adapter,
    dataset_ids_are_names,
    there_are_images_to_train_on,
    one_text_cache_is_the_default,
    captions_are_kept_in_the_default_cache,
    crops_have_their_shapes,
    own_sizes_are_not_cut,
    records_have_keys_of_their_own,
    aspect_limits_go_together,
    eval_datasets_are_not_trained_on,
    schedules_end_after_they_start,
    some_dataset_takes_part_at_any_time,
    something_new_is_learned,
    epochs_have_a_length,
    conditioning_belongs_to_images,
    references_fit_the_family,
    captions_fit_their_source,
    a_fallback_has_its_use,
    tables_have_their_strategy,
    embeddings_of_files_stand_for_captions,
    caption_filters_can_be_read,
)


def conditioning_has_images(draft: Draft) -> Iterator[str]:
    entries = draft.datasets.entries
    used = {each.id for entry in draft.images for each in conditioning_for(entry, entries)}
    for entry in entries:
        if isinstance(entry, ConditioningDataset) and entry.id not in used:
            what = "masks" if entry.is_mask else "references"
            place = draft.datasets.place(entry.id, "dataset_type")
            yield f"{place}: {entry.id}: no dataset names it in conditioning_data: its {what} are not used"


def new_crops_differ(draft: Draft) -> Iterator[str]:
    for entry in draft.images:
        if entry.vae_cache_clear_each_epoch and not samples_crops(entry):
            place = draft.datasets.place(entry.id, "vae_cache_clear_each_epoch")
            yield (
                f"{place}: {entry.id}: vae_cache_clear_each_epoch resamples nothing: neither crop_style nor "
                "crop_aspect is random"
            )


def samples_crops(entry: ImageDataset) -> bool:
    """Whether any part of an entry's crops is random."""
    return entry.crop and "random" in (entry.crop_style, entry.crop_aspect)


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


DATASET_NOTICES = (text_caches_have_a_use, conditioning_has_images, new_crops_differ)
