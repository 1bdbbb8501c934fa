"""Where the latents of each dataset come from: filled caches, or a VAE that stays for what is missing.

Caches are filled before the denoiser is loaded, and the VAE is freed in between; `vae_cache_ondemand` keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from simpletuner.batch import Sample
from simpletuner.cache.adopting import folders_beside, opened
from simpletuner.cache.encoding import ManySamples
from simpletuner.cache.fingerprints import vae_fingerprint
from simpletuner.cache.latents import LatentCache, OnDemandLatents
from simpletuner.cache.store import DamagedEntry, TensorStore
from simpletuner.config.options import TrainConfig
from simpletuner.data.backends.build import source_key
from simpletuner.data.dataset import Dataset
from simpletuner.data.digests import DigestMemo
from simpletuner.data.entry_rules import latents_folder
from simpletuner.data.kept import KeptSamples
from simpletuner.errors import DataError, Problem
from simpletuner.models.family import LatentMoments, ModelFamily
from simpletuner.models.lazy_vae import LazyVae
from simpletuner.randomness import keyed_generator
from simpletuner.training.phases import Phase
from simpletuner.training.process import Process
from simpletuner.training.signals import StopRequest

# Ready latents of small sets stay in memory: reading and drawing them again takes longer than a tiny model's step.
MEMO_BYTES = 256 * 2**20


@dataclass(frozen=True)
class ImageInput:
    """What a cache is filled from: see `ImageSource`."""

    samples: ManySamples
    read_pixels: Callable[[Sample], Tensor]


class DatasetLatents:
    """Scaled latents of one dataset, or of the references in one folder.

    Args:
        cache: holds the moments.
        read_pixels: of a sample; called from several threads.
        load_vae: called when something must be encoded during training: on demand, or because an entry is damaged.
        batch_size: images in every batch that the VAE sees (`vae_batch_size`).
        keeps: whether what is encoded during training is written.
        resamples: crops are resampled in each round, so that ready latents do not come again.
    """

    def __init__(
        self,
        cache: LatentCache,
        read_pixels: Callable[[Sample], Tensor],
        load_vae: Callable[[], nn.Module],
        batch_size: int,
        seed: int,
        keeps: bool = True,
        resamples: bool = False,
    ):
        self.cache = cache
        self.family = cache.family
        self.images = ImageInput((), read_pixels)
        self.load_vae = load_vae
        self.batch_size = batch_size
        self.seed = seed
        self.keeps = keeps
        self.resamples = resamples
        self.vae_config = self.family.vae_config
        self._on_demand: OnDemandLatents | None = None
        self._memo: dict[str, Tensor] = {}
        self._memo_bytes = 0

    def latents(self, samples: Sequence[Sample]) -> list[Tensor]:
        """(C, h, w) float32 of each sample, scaled and shifted; the posterior's draw is keyed by (seed, content)."""
        names = [_content(sample) for sample in samples]
        # Taken out first: what is remembered of this batch may push out what another of its samples has there.
        ready = {name: self._memo[name] for name in names if name in self._memo}
        missing = {name: sample for name, sample in zip(names, samples, strict=True) if name not in ready}
        for name, moments in zip(missing, self._moments(list(missing.values())), strict=True):
            generator = keyed_generator(self.seed, "posterior", name)
            ready[name] = self.family.latents_from_moments(moments, generator, self.vae_config)
            self._remember(name, ready[name])
        return [ready[name] for name in names]

    def encode_on_demand(self) -> OnDemandLatents:
        """The encoder for what the cache lacks; loads the VAE on first use and keeps it."""
        if self._on_demand is None:
            vae = self.load_vae()
            self._on_demand = OnDemandLatents(self.cache, self.images, vae, self.batch_size, self.keeps)
        return self._on_demand

    def close(self) -> None:
        """Write what was encoded on demand."""
        if self._on_demand is not None:
            self._on_demand.close()

    def _moments(self, samples: Sequence[Sample]) -> list[LatentMoments]:
        if not samples:
            return []
        if self._on_demand is not None:
            return self._on_demand.get_many(samples)
        try:
            return [self.cache.get(sample) for sample in samples]
        except DamagedEntry:
            return self.encode_on_demand().get_many(samples)

    def _remember(self, name: str, row: Tensor) -> None:
        size = row.numel() * row.element_size()
        if self.resamples:  # crops of earlier rounds do not come again
            while self._memo and self._memo_bytes + size > MEMO_BYTES:
                oldest = self._memo.pop(next(iter(self._memo)))
                self._memo_bytes -= oldest.numel() * oldest.element_size()
        if self._memo_bytes + size <= MEMO_BYTES:
            self._memo[name] = row
            self._memo_bytes += size


def _content(sample: Sample) -> str:
    """Names what the VAE sees; keys the draw from its posterior."""
    name = f"{sample.digest}/{sample.crop}"
    return f"{name}/flipped" if sample.is_flipped else name


LatentSources = Mapping[str, DatasetLatents]


def prepare_latents(
    config: TrainConfig, family: ModelFamily, datasets: Sequence[Dataset], process: Process
) -> tuple[list[Dataset], LatentSources]:
    """Fill the caches, or get ready to fill them on demand.

    Returns:
        The datasets without the images that cannot be encoded, and the sources by dataset id.

    Raises:
        DataError: nothing usable is left of a dataset, no disk space, no memory.
        Interrupted: a signal came; what was encoded stays.
    """
    cache_dir = Path(config.data.cache_dir)
    fingerprint = fingerprint_of_vae(family, cache_dir)
    vae = LazyVae(family)
    kept, sources = [], {}
    for dataset in datasets:
        # Two datasets may share the references of one folder, and then their cache.
        for part in dataset.parts:
            if part.id not in sources:
                store = TensorStore(latents_folder(part.entry, cache_dir, family.spec))
                cache = LatentCache(store, family, fingerprint, config.data.write_batch_size)
                made = DatasetLatents(
                    cache, part.read_pixels, vae.load, config.data.vae_batch_size, config.training.seed
                )
                sources[part.id] = made
            sources[part.id].keeps &= dataset.keeps_latents
            sources[part.id].resamples |= dataset.samples.draws.crops
        kept.append(dataset if dataset.encodes_on_demand else fill_caches(dataset, sources, vae, cache_dir, process))
    for dataset in kept:
        if dataset.encodes_on_demand:
            for part in dataset.parts:
                cache = sources[part.id].cache
                if process.process_group.is_main and dataset.keeps_latents and not cache.store.stats().num_entries:
                    adopt_latents(cache, KeptSamples(dataset, part.id), cache_dir)
                sources[part.id].encode_on_demand()
    if not any(dataset.encodes_on_demand for dataset in kept):
        vae.free()
    return kept, sources


def fingerprint_of_vae(family: ModelFamily, cache_dir: Path) -> str:
    """Of the VAE that a run encodes with: part of the key of each of its latents.

    Raises:
        DataError: as `vae_fingerprint`.
    """
    with DigestMemo(cache_dir / "digests.sqlite") as memo:
        return vae_fingerprint(family.source, family.spec, memo, family.device, torch.float32, family.vae_modes)


def adopt_latents(cache: LatentCache, samples: KeptSamples, cache_dir: Path) -> int:
    """Take over latents that are in the folder of another dataset, as after a change of an id; how many."""
    folders = folders_beside(cache_dir / "vae", cache.store.folder)
    if not folders:
        return 0
    with opened(folders) as others:
        return cache.adopt(samples, others)


def fill_caches(dataset: Dataset, sources: LatentSources, vae: LazyVae, cache_dir: Path, process: Process) -> Dataset:
    """Encode what is missing of one dataset and its references; gives it back without what cannot be encoded.

    Each process encodes its share.
    """
    bad: dict[tuple[str, str], str] = {}
    process_group = process.process_group
    for name in (part.id for part in dataset.parts):
        cache, source = sources[name].cache, sources[name]
        share = KeptSamples(dataset, name, process_group.rank, process_group.size)
        everything = set_fingerprint(dataset, name, cache)
        with process.phase(f"caching latents of {name}", len(share)) as progress:
            num_cached = process_group.from_main(cache.store.complete(everything))
            if num_cached is not None:
                progress.summary = f"0 encoded, {num_cached} cached before"
                continue
            images = ImageInput(share, source.images.read_pixels)
            with process_group.main_first():
                if process_group.is_main:
                    adopt_latents(cache, KeptSamples(dataset, name), cache_dir)
            report = cache.fill(
                images, vae.load, source.batch_size, _progress_reporter(progress, process.stop), process_group.size
            )
            progress.summary = f"{report.num_encoded} encoded, {report.num_cached} cached before"
        unusable = [
            each for each in process_group.gather([[each.sample.path, each.reason] for each in report.unusable]) if each
        ]
        for of_process in unusable:
            bad |= {(name, path): reason for path, reason in of_process}
        (num_entries,) = process_group.sum([report.num_encoded + report.num_cached])
        if process_group.is_main and not unusable:
            cache.store.note_complete(everything, round(num_entries))
    for (name, path), reason in bad.items():
        process.warn(f"{name}: {path} is left out: {reason}")
    return without(dataset, bad) if bad else dataset


def set_fingerprint(dataset: Dataset, part_id: str, cache: LatentCache) -> str:
    """Names all latents of a dataset, or of its references: a start that finds them complete asks for no single one.

    A digest of whatever decides which samples there are, how they are cut, and what the VAE makes of them.
    """
    return cache.set_fingerprint(cache.family.spec.name, dataset.id, part_id, dataset.fingerprint)


def without(dataset: Dataset, bad: Mapping[tuple[str, str], str]) -> Dataset:
    """The dataset without images that cannot be encoded, or whose references cannot: they belong to no bucket.

    Args:
        bad: (dataset id, path) -> reason.

    Raises:
        DataError: none is left.
    """
    buckets = {}
    for size, members in dataset.buckets.items():
        samples = dataset.samples.take(members)
        good = [not any((each.dataset_id, each.path) in bad for each in (s, *s.references)) for s in samples]
        if any(good):
            buckets[size] = members[np.array(good)]
    for (name, path), reason in bad.items():
        dataset.filter_report.skipped.add(reason if name == dataset.id else f"{name}: {reason}", path)
    if not buckets:
        raise DataError(
            Problem(
                f"no image of dataset {dataset.id} can be encoded; the first: {next(iter(bad.values()))}",
                key=f"{dataset.id}.{source_key(dataset.entry)}",
                fix="repair the images or take the dataset out",
            )
        )
    counts = {size: len(members) for size, members in buckets.items()}
    filter_report = replace(dataset.filter_report, bucketed=sum(counts.values()), buckets=counts)
    return replace(dataset, buckets=buckets, filter_report=filter_report)


def _progress_reporter(progress: Phase, stop: StopRequest) -> Callable[[int, int], None]:
    def report(done: int, total: int) -> None:
        progress.advance(done - progress.done)
        stop.check()

    return report
