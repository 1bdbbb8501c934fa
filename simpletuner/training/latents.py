"""Where the latents of each dataset come from: filled caches, or a VAE that stays for what is missing.

Caches are filled before the denoiser is loaded, and the VAE is freed in between; `vae_cache_ondemand` keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from simpletuner.batch import Sample
from simpletuner.cache.fingerprints import vae_fingerprint
from simpletuner.cache.latents import LatentCache, OnDemandLatents
from simpletuner.cache.store import DamagedEntry, TensorStore
from simpletuner.config.datasets import ImageDataset
from simpletuner.config.loading import LoadedRun
from simpletuner.data.backends.build import source_key
from simpletuner.data.dataset import Dataset
from simpletuner.data.digests import DigestMemo
from simpletuner.distributed.world import ALONE, World
from simpletuner.errors import DataError, Problem
from simpletuner.models.components import component_config
from simpletuner.models.family import LatentMoments, ModelFamily
from simpletuner.models.spec import FamilySpec
from simpletuner.randomness import keyed_generator
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.events import Notice
from simpletuner.training.phases import Phase, phase
from simpletuner.training.signals import StopRequest

# Ready latents of small sets stay in memory: reading and drawing them again takes longer than a tiny model's step.
MEMO_BYTES = 256 * 2**20


class DatasetLatents:
    """Scaled latents of one dataset.

    Args:
        cache: holds the moments.
        load_vae: called when something must be encoded during training: on demand, or because an entry is damaged.
        batch_size: pictures in every batch that the VAE sees (`vae_batch_size`).
    """

    def __init__(
        self, cache: LatentCache, dataset: Dataset, load_vae: Callable[[], nn.Module], batch_size: int, seed: int
    ):
        self.cache = cache
        self.family = cache.family
        self.dataset = dataset
        self.load_vae = load_vae
        self.batch_size = batch_size
        self.seed = seed
        self.vae_config = component_config(self.family.source, self.family.spec.component("vae"))
        self._on_demand: OnDemandLatents | None = None
        self._memo: dict[str, Tensor] = {}
        self._memo_bytes = 0

    def latents(self, samples: Sequence[Sample]) -> list[Tensor]:
        """(C, h, w) float32 of each sample, scaled and shifted; the posterior's draw is keyed by (seed, content)."""
        names = [_content(sample) for sample in samples]
        missing = [sample for name, sample in zip(names, samples, strict=True) if name not in self._memo]
        fresh = dict(zip(map(_content, missing), self._moments(missing), strict=True))
        rows = []
        for name in names:
            if name not in self._memo:
                generator = keyed_generator(self.seed, "posterior", name)
                row = self.family.latents_from_moments(fresh[name], generator, self.vae_config)
                self._remember(name, row)
            else:
                row = self._memo[name]
            rows.append(row)
        return rows

    def encode_on_demand(self) -> OnDemandLatents:
        """The encoder for what the cache lacks; loads the VAE on first use and keeps it."""
        if self._on_demand is None:
            keeps = self.dataset.keeps_latents
            self._on_demand = OnDemandLatents(self.cache, self.dataset, self.load_vae(), self.batch_size, keeps)
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
        if self.dataset.samples.draws.crops:  # crops of earlier rounds do not come again
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


class SharedVae:
    """Loads the VAE once for all datasets, and lets go of it."""

    def __init__(self, family: ModelFamily):
        self.family = family
        self._vae: nn.Module | None = None

    def load(self) -> nn.Module:
        if self._vae is None:
            self._vae = self.family.load_vae()
        return self._vae

    def free(self) -> None:
        self._vae = None
        if self.family.device.type == "cuda":
            torch.cuda.empty_cache()


def prepare_latents(
    loaded: LoadedRun,
    family: ModelFamily,
    datasets: Sequence[Dataset],
    bus: EventBus,
    stop: StopRequest,
    world: World = ALONE,
) -> tuple[list[Dataset], LatentSources]:
    """Fill the caches, or get ready to fill them on demand.

    Returns:
        The datasets without the pictures that cannot be encoded, and the sources by dataset id.

    Raises:
        DataError: nothing usable is left of a dataset, no disk space, no memory.
        Interrupted: a signal came; what was encoded stays.
    """
    config = loaded.config
    cache_dir = Path(config.cache_dir)
    memo = DigestMemo(cache_dir / "digests.sqlite")
    fingerprint = vae_fingerprint(family.source, family.spec, memo, family.device, torch.float32)
    vae = SharedVae(family)
    kept, sources = [], {}
    for dataset in datasets:
        folder = latents_folder(dataset.entry, cache_dir, family.spec)
        cache = LatentCache(TensorStore(folder), family, fingerprint)
        if not dataset.encodes_on_demand:
            dataset = fill_cache(cache, dataset, vae, config.vae_batch_size, bus, stop, world)
        kept.append(dataset)
        sources[dataset.id] = DatasetLatents(cache, dataset, vae.load, config.vae_batch_size, config.seed)
    for dataset in kept:
        if dataset.encodes_on_demand:
            sources[dataset.id].encode_on_demand()
    if not any(dataset.encodes_on_demand for dataset in kept):
        vae.free()
    return kept, sources


@dataclass(frozen=True)
class Pictures:
    """What a cache is filled from: see `PictureSource`."""

    samples: Sequence[Sample]
    read_pixels: Callable[[Sample], Tensor]


def latents_folder(entry: ImageDataset, cache_dir: Path, spec: FamilySpec) -> Path:
    """Where the latents of a dataset are kept."""
    return Path(entry.cache_dir_vae or cache_dir / "vae" / spec.name / entry.id)


def fill_cache(
    cache: LatentCache,
    dataset: Dataset,
    vae: SharedVae,
    batch_size: int,
    bus: EventBus,
    stop: StopRequest,
    world: World = ALONE,
) -> Dataset:
    """Encode what is missing of one dataset; gives it back without the pictures that cannot be encoded.

    Each process encodes its share of the pictures.
    """
    pictures = Pictures(world.share(list(dataset.samples_to_keep())), dataset.read_pixels)
    with phase(bus, f"caching latents of {dataset.id}", len(pictures.samples)) as progress:
        report = cache.fill(pictures, vae.load, batch_size, report=_teller(progress, stop))
        progress.summary = f"{report.num_encoded} encoded, {report.num_cached} cached before"
    unusable = {
        path: reason
        for of_process in world.gather([[bad.sample.path, bad.reason] for bad in report.unusable])
        for path, reason in of_process
    }
    for path, reason in unusable.items():
        bus.emit(Notice("warning", f"{dataset.id}: {path} is left out: {reason}"))
    return without(dataset, unusable) if unusable else dataset


def without(dataset: Dataset, bad: Mapping[str, str]) -> Dataset:
    """The dataset without unusable samples: they keep their index but belong to no bucket.

    Args:
        bad: path -> why it cannot be encoded.
    """
    buckets = {}
    for size, members in dataset.buckets.items():
        good = [int(index) for index in members if dataset.samples[int(index)].path not in bad]
        if good:
            buckets[size] = members[[int(index) in set(good) for index in members]]
    if not buckets:
        raise DataError(
            Problem(
                f"no picture of dataset {dataset.id} can be encoded; the first: {next(iter(bad.values()))}",
                key=f"{dataset.id}.{source_key(dataset.entry)}",
                fix="repair the pictures or take the dataset out",
            )
        )
    return replace(dataset, buckets=buckets)


def _teller(progress: Phase, stop: StopRequest) -> Callable[[int, int], None]:
    def tell(done: int, total: int) -> None:
        progress.advance(done - progress.done)
        stop.check()

    return tell
