"""Where the embeddings of captions and prompts come from: a filled cache, or encoders that stay for what is missing.

Families whose denoiser reads tokens ask their tokenizer each time. For all others every text of the run is encoded
before the denoiser is loaded, and the encoders are freed; `text_cache_ondemand` keeps them. Where encoders look at
reference images, a text is encoded once for each set of references that it may have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from simpletuner.batch import PromptRequest, Sample
from simpletuner.cache.fingerprints import prompt_fingerprint
from simpletuner.cache.prompts import CachedPrompts, PromptCache
from simpletuner.cache.store import TensorStore
from simpletuner.config.datasets import text_cache_entry
from simpletuner.config.loading import LoadedRun
from simpletuner.config.options import TrainConfig
from simpletuner.config.options.data import DataOptions
from simpletuner.config.options.training import TrainingOptions
from simpletuner.data.dataset import Dataset
from simpletuner.data.digests import DigestMemo
from simpletuner.data.holdout import hold_out
from simpletuner.errors import ConfigError, Problem
from simpletuner.families.spec import FamilySpec
from simpletuner.models.family import ModelFamily
from simpletuner.models.lazy_vae import give_back_memory
from simpletuner.training.process import Process
from simpletuner.validation.prompts import requests_from_config
from simpletuner.validation.references import ReferenceImage, references_of_run

# What the proof of a written adapter asks the denoiser (`training/adapter_roundtrip.py`).
PROBE_PROMPT = "a probe of the adapter"


def prepare_prompts(loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset], process: Process) -> None:
    """Fill the cache of captions, or get ready to fill it on demand; `family.prompts` gives embeddings from then on.

    Each process encodes its share of the texts.

    Raises:
        DataError: the encoders cannot be loaded, or the disk has no room.
        Interrupted: a signal came; what was encoded stays.
    """
    if not family.spec.caches_prompt_embeds:
        return
    config, process_group = loaded.config, process.process_group
    on_demand = config.data.text_cache_ondemand or config.data.text_cache_disable
    if family.spec.prompts_see_references and not on_demand:
        require_lasting_references(datasets)
    cache = open_prompt_cache(loaded, family)
    family.prompts = CachedPrompts(
        cache,
        keeps_encoders=on_demand,
        keeps_entries=not config.data.text_cache_disable,
        warn=process.warn,
    )
    if on_demand:
        return

    with process.phase("caching captions") as progress:

        def show_progress(done: int, total: int) -> None:
            progress.advance(done - progress.done)
            process.stop.check()

        everything = _set_fingerprint(loaded, cache, datasets)
        num_cached = process_group.from_main(cache.store.complete(everything))
        if num_cached is not None:
            progress.summary = f"0 encoded, {num_cached} cached before"
        else:
            wanted = list(dict.fromkeys(run_prompts(loaded, family, datasets)))
            report = cache.fill(process_group.share(wanted), show_progress)
            progress.summary = f"{report.num_encoded} encoded, {report.num_cached} cached before"
            process_group.barrier()
            if process_group.is_main:
                cache.store.note_complete(everything, len(wanted))
    family.free_prompt_encoders()
    give_back_memory(family.device)


def require_lasting_references(datasets: Sequence[Dataset]) -> None:
    """Refuse references that are cropped anew in each round: their embeddings cannot be computed in advance.

    Raises:
        ConfigError: names the dataset.
    """
    for dataset in datasets:
        if dataset.samples.draws.crops and any(each.rules.is_strict for each in dataset.references):
            message = f"{dataset.id}: its references are cropped anew in each round, and prompts are encoded with them"
            fix = "remove the key, or set text_cache_ondemand, which keeps the encoders in memory"
            raise ConfigError(Problem(message, key=f"{dataset.id}.vae_cache_clear_each_epoch", fix=fix))


def open_prompt_cache(loaded: LoadedRun, family: ModelFamily) -> PromptCache:
    """The cache of captions of a configuration."""
    config, cache_dir = loaded.config, Path(loaded.config.data.cache_dir)
    entry = text_cache_entry(loaded.datasets)
    with DigestMemo(cache_dir / "digests.sqlite") as memo:
        fingerprint = prompt_fingerprint(family, memo)
    per_write = (entry.write_batch_size if entry else None) or config.data.write_batch_size
    return PromptCache(TensorStore(prompts_folder(loaded, family.spec)), family, fingerprint, per_write)


def prompts_folder(loaded: LoadedRun, spec: FamilySpec) -> Path:
    """Where the embeddings of captions are kept."""
    entry = text_cache_entry(loaded.datasets)
    return Path((entry.cache_dir if entry else None) or Path(loaded.config.data.cache_dir) / "text" / spec.name)


def _set_fingerprint(loaded: LoadedRun, cache: PromptCache, datasets: Sequence[Dataset]) -> str:
    """Names all texts of a run: a start that finds them complete asks for no single one (`training/latents.py`)."""
    spec = cache.family.spec
    captions = [dataset.fingerprint for dataset in datasets]
    fixed = list(fixed_prompts(loaded, cache.family, datasets))
    if not spec.prompts_see_references:
        return cache.set_fingerprint(captions, [request.text for request in fixed])
    texts = [[request.text, [image.content for image in request.images]] for request in fixed]
    seen = [_sees_one_reference(loaded.config.data), keeps_references_of_dropped(loaded.config.training, spec)]
    return cache.set_fingerprint(captions, texts, seen)


def run_prompts(loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset]) -> Iterator[PromptRequest]:
    """Every text that the run may ask for: the fixed ones, and all variants of all captions."""
    yield from fixed_prompts(loaded, family, datasets)
    spec = family.spec
    for dataset in datasets:
        if spec.prompts_see_references and dataset.references:
            yield from _prompts_with_references(loaded.config, spec, dataset)
            continue
        for sample in dataset.samples if dataset.prompt_files is None else ():
            for caption in sample.captions:
                yield PromptRequest(caption)


def _prompts_with_references(config: TrainConfig, spec: FamilySpec, dataset: Dataset) -> Iterator[PromptRequest]:
    """The captions of each sample with the references that the model sees with them, and where a caption may be
    dropped alone, the dropped caption with them."""
    files = dataset.prompt_files
    drops = keeps_references_of_dropped(config.training, spec) and not (files and files.has_dropped)
    dropped = (spec.dropped_caption,) if drops else ()
    for sample in dataset.samples.every_version():
        one = _sees_one_reference(config.data)
        rows: list[Sequence[Sample]] = [[each] for each in sample.references] if one else [sample.references]
        for images in dataset.prompt_images(rows):
            for text in (*(() if files else sample.captions), *dropped):
                yield PromptRequest(text, images)


def fixed_prompts(loaded: LoadedRun, family: ModelFamily, datasets: Sequence[Dataset]) -> Iterator[PromptRequest]:
    """The texts that stand in no dataset: dropped captions, validation, proof."""
    config, spec = loaded.config, family.spec
    if not has_all_embeddings(config, datasets):
        yield from map(PromptRequest, (spec.dropped_caption, "", PROBE_PROMPT))
    references: tuple[ReferenceImage, ...] = ()
    if spec.prompts_see_references and not config.validation.validation_disable:
        divided = hold_out(list(datasets), config.evaluation.eval_holdout)
        references = references_of_run(config.validation, divided, _sees_one_reference(config.data))
    requests, _ = requests_from_config(
        config,
        loaded.prompt_library,
        spec.size_multiple,
        empty_prompt=spec.dropped_caption,
        references=references,
    )
    for request in requests:
        seen = request.references if spec.prompts_see_references else ()
        images = tuple(family.prompt_image(each.image) for each in seen)
        yield PromptRequest(request.prompt, images)
        yield PromptRequest(spec.negative_text(request.settings.negative_prompt), images)


def keeps_references_of_dropped(options: TrainingOptions, spec: FamilySpec) -> bool:
    """Whether a caption may be dropped while the references of its image stay."""
    share = options.reference_dropout_probability
    return bool(options.caption_dropout_probability) and (spec.drops_references if share is None else share) < 1


def _sees_one_reference(options: DataOptions) -> bool:
    return options.conditioning_multidataset_sampling == "random"


def has_all_embeddings(config: TrainConfig, datasets: Sequence[Dataset]) -> bool:
    """Whether training asks for no text: all embeddings are in files, and there is no adapter file to prove."""
    drops = bool(config.training.caption_dropout_probability)
    files = [dataset.prompt_files for dataset in datasets]
    return config.model.model_type == "full" and all(each and (each.has_dropped or not drops) for each in files)
