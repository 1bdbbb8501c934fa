"""Where the embeddings of captions and prompts come from: a filled cache, or encoders that stay for what is missing.

Families whose denoiser reads tokens ask their tokenizer each time. For all others every text of the run is encoded
before the denoiser is loaded, and the encoders are freed; `text_cache_ondemand` keeps them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from simpletuner.cache.fingerprints import prompt_fingerprint
from simpletuner.cache.prompts import CachedPrompts, PromptCache
from simpletuner.cache.store import TensorStore
from simpletuner.config.datasets import text_cache_entry
from simpletuner.config.loading import LoadedRun
from simpletuner.data.dataset import Dataset
from simpletuner.data.digests import DigestMemo
from simpletuner.distributed.process_group import SINGLE_PROCESS, ProcessGroup
from simpletuner.families.spec import FamilySpec
from simpletuner.models.family import ModelFamily
from simpletuner.models.lazy_vae import give_back_memory
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice
from simpletuner.training.phases import phase
from simpletuner.training.signals import StopRequest
from simpletuner.validation.prompts import requests_from_config

# What the proof of a written adapter asks the denoiser (`training/adapter_roundtrip.py`).
PROBE_PROMPT = "a probe of the adapter"


def prepare_prompts(
    loaded: LoadedRun,
    family: ModelFamily,
    datasets: Sequence[Dataset],
    bus: EventBus,
    stop: StopRequest,
    process_group: ProcessGroup = SINGLE_PROCESS,
) -> None:
    """Fill the cache of captions, or get ready to fill it on demand; `family.prompts` gives embeddings from then on.

    Each process encodes its share of the texts.

    Raises:
        DataError: the encoders cannot be loaded, or the disk has no room.
        Interrupted: a signal came; what was encoded stays.
    """
    if not family.spec.caches_prompt_embeds:
        return
    config = loaded.config
    cache = open_prompt_cache(loaded, family)
    on_demand = config.text_cache_ondemand or config.text_cache_disable
    family.prompts = CachedPrompts(
        cache,
        keeps_encoders=on_demand,
        keeps_entries=not config.text_cache_disable,
        warn=lambda line: bus.emit(Notice("warning", line)),
    )
    if on_demand:
        return

    with phase(bus, "caching captions") as progress:

        def show_progress(done: int, total: int) -> None:
            progress.advance(done - progress.done)
            stop.check()

        everything = _set_fingerprint(loaded, cache, datasets)
        num_cached = process_group.from_main(cache.store.complete(everything))
        if num_cached is not None:
            progress.summary = f"0 encoded, {num_cached} cached before"
        else:
            texts = list(dict.fromkeys(run_prompts(loaded, family.spec, datasets)))
            report = cache.fill(process_group.share(texts), show_progress)
            progress.summary = f"{report.num_encoded} encoded, {report.num_cached} cached before"
            process_group.barrier()
            if process_group.is_main:
                cache.store.note_complete(everything, len(texts))
    family.free_prompt_encoders()
    give_back_memory(family.device)


def open_prompt_cache(loaded: LoadedRun, family: ModelFamily) -> PromptCache:
    """The cache of captions of a configuration."""
    config, cache_dir = loaded.config, Path(loaded.config.cache_dir)
    entry = text_cache_entry(loaded.datasets)
    with DigestMemo(cache_dir / "digests.sqlite") as memo:
        fingerprint = prompt_fingerprint(family, memo)
    per_write = (entry.write_batch_size if entry else None) or config.write_batch_size
    return PromptCache(TensorStore(prompts_folder(loaded, family.spec)), family, fingerprint, per_write)


def prompts_folder(loaded: LoadedRun, spec: FamilySpec) -> Path:
    """Where the embeddings of captions are kept."""
    entry = text_cache_entry(loaded.datasets)
    return Path((entry.cache_dir if entry else None) or Path(loaded.config.cache_dir) / "text" / spec.name)


def _set_fingerprint(loaded: LoadedRun, cache: PromptCache, datasets: Sequence[Dataset]) -> str:
    """Names all texts of a run: a start that finds them complete asks for no single one (`training/latents.py`)."""
    captions = [dataset.fingerprint for dataset in datasets]
    return cache.set_fingerprint(captions, list(fixed_prompts(loaded, cache.family.spec, datasets)))


def run_prompts(loaded: LoadedRun, spec: FamilySpec, datasets: Sequence[Dataset]) -> Iterator[str]:
    """Every text that the run may ask for: the fixed ones, and all variants of all captions."""
    yield from fixed_prompts(loaded, spec, datasets)
    for dataset in datasets:
        for sample in dataset.samples if dataset.prompt_files is None else ():
            yield from sample.captions


def fixed_prompts(loaded: LoadedRun, spec: FamilySpec, datasets: Sequence[Dataset]) -> Iterator[str]:
    """The texts that stand in no dataset: dropped captions, validation, proof."""
    if not has_all_embeddings(loaded, datasets):
        yield from (spec.dropped_caption, "", PROBE_PROMPT)
    requests, _ = requests_from_config(
        loaded.config, loaded.prompt_library, spec.size_multiple, empty_prompt=spec.dropped_caption
    )
    for request in requests:
        yield request.prompt
        yield spec.negative_text(request.settings.negative_prompt)


def has_all_embeddings(loaded: LoadedRun, datasets: Sequence[Dataset]) -> bool:
    """Whether training asks for no text: all embeddings are in files, and there is no adapter file to prove."""
    config = loaded.config
    drops = bool(config.caption_dropout_probability)
    files = [dataset.prompt_files for dataset in datasets]
    return config.model_type == "full" and all(each and (each.has_dropped or not drops) for each in files)
