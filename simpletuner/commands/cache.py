"""`simpletuner cache`: fill the caches before a run, prove them, clear them out, and say what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from simpletuner.cache.latents import LatentCache
from simpletuner.cache.prompts import CachedPrompts
from simpletuner.cache.store import QUARANTINE, StoreStats, TensorStore
from simpletuner.commands.text import Say
from simpletuner.config.datasets import ImageDataset, TextEmbedsDataset
from simpletuner.config.loading import LoadedRun
from simpletuner.data.entry_rules import latents_folder
from simpletuner.data.kept import KeptSamples
from simpletuner.errors import bytes_text
from simpletuner.families.registry import get_spec
from simpletuner.models.build import build_family
from simpletuner.reporting.bus import EventBus
from simpletuner.reporting.sinks.terminal import terminal_sink
from simpletuner.text import count_text
from simpletuner.training.fitting import fit_into_memory
from simpletuner.training.kernels import chosen_kernels
from simpletuner.training.latents import fingerprint_of_vae
from simpletuner.training.preflight import check_model_folder
from simpletuner.training.prepare import prepare_data, prepare_datasets, read_datasets
from simpletuner.training.process import Process
from simpletuner.training.prompts import open_prompt_cache, prompts_folder, run_prompts
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest

CAPTIONS = "captions"  # who uses the folder of prompt embeddings, where datasets are named


@dataclass(frozen=True)
class CacheFolder:
    """A folder of cached tensors.

    Args:
        datasets: ids of the configured datasets that use it, or `captions`; empty where none does.
    """

    path: Path
    datasets: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.path} ({', '.join(self.datasets) or 'no dataset of this configuration'})"

    @property
    def quarantined(self) -> list[Path]:
        """Damaged files that were moved to quarantine."""
        folder = self.path / QUARANTINE
        return sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []


def cache_folders(loaded: LoadedRun) -> list[CacheFolder]:
    """Those of the configured datasets that are there, and every other one in `cache_dir`."""
    spec, cache_dir = get_spec(loaded.config.model.model_family), Path(loaded.config.data.cache_dir)
    users: dict[Path, list[str]] = {}
    records: dict[Path, str] = {}
    for entry in loaded.datasets:
        if entry.disabled or isinstance(entry, TextEmbedsDataset):
            continue
        if isinstance(entry, ImageDataset) and entry.type == "records":
            records[latents_folder(entry, cache_dir, spec).resolve()] = entry.id
        elif isinstance(entry, ImageDataset) or entry.is_reference:
            users.setdefault(latents_folder(entry, cache_dir, spec).resolve(), []).append(entry.id)
    if spec.caches_prompt_embeds:
        users.setdefault(prompts_folder(loaded, spec).resolve(), []).append(CAPTIONS)
    found = {path.parent.resolve() for path in cache_dir.rglob("shard-*.safetensors") if path.parent.name != QUARANTINE}
    # Of records each part has a folder of its own in that of the entry.
    users |= {path: [records[path.parent]] for path in found if path.parent in records}
    there = found | {path for path in users if path.is_dir()}
    return [CacheFolder(path, tuple(users.get(path, ()))) for path in sorted(there)]


def build(loaded: LoadedRun) -> None:
    """Do what training does before it loads the denoiser; what is encoded on demand otherwise is encoded too.

    Raises:
        SimpleTunerError: as training would.
    """
    check_model_folder(loaded)
    output_dir = Path(loaded.config.checkpoint.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with EventBus([terminal_sink()]) as bus, StopRequest() as stop:
        process = Process(guard=FolderGuard(output_dir), bus=bus, stop=stop)
        for line in loaded.warnings:
            process.warn(line)
        family = build_family(loaded.config)
        with chosen_kernels(loaded.config, family.device):
            loaded = _without_on_demand(loaded)
            datasets = prepare_datasets(loaded, family, process)
            loaded, _ = fit_into_memory(loaded, family, datasets, process)
            family = build_family(loaded.config)
            _, sources = prepare_data(loaded, family, process, datasets)
        folders = {source.cache.store.folder: source.cache.store for source in sources.values()}
        if isinstance(family.prompts, CachedPrompts):
            folders[family.prompts.cache.store.folder] = family.prompts.cache.store
        for folder, store in folders.items():
            stats = store.stats()
            process.inform(f"{folder}: {stats.num_entries} entries, {bytes_text(stats.num_bytes)}")
            store.close()


def verify(loaded: LoadedRun, say: Say) -> int:
    """Compare every entry with its sha256; damaged ones are moved to quarantine.

    Returns:
        Number of damaged entries.
    """
    num_damaged = 0
    for folder, store in _stores(loaded, say):
        damaged = store.verify()
        num_damaged += len(damaged)
        sound = f"{count_text(store.stats().num_entries, 'entry', 'entries')} sound"
        say(f"{folder.label}: {sound}, {len(damaged)} damaged")
        for key in damaged:
            say(f"  damaged: {key}")
        if damaged:
            say(f"  the damaged files are in {folder.path / QUARANTINE}; the next start encodes what is missing")
    return num_damaged


def prune(loaded: LoadedRun, say: Say, dry_run: bool = False, others: bool = False) -> int:
    """Remove entries that no configured dataset uses, and what is in quarantine as damaged.

    Args:
        dry_run: only say what would be removed.
        others: also empty the folders that no dataset of this configuration uses; other configurations may.

    Returns:
        How many bytes became free on the disk.
    """
    wanted = used_keys(loaded)
    num_bytes, would = 0, "would remove" if dry_run else "removed"
    for folder, store in _stores(loaded, say):
        held = store.stats()
        if not folder.datasets and not others:
            say(f"{folder.label}: left alone, {bytes_text(held.num_bytes)}; --others empties it")
            continue
        keep = wanted.get(folder.path, set())
        num_unused = len(set(store.keys()) - keep)
        if not dry_run:
            num_bytes += store.prune(keep) + _remove(folder.quarantined)
        aside = f" and {count_text(len(folder.quarantined), 'damaged file')}" if folder.quarantined else ""
        say(f"{folder.label}: {would} {num_unused} of {held.num_entries} entries{aside}")
    if not dry_run:
        say(f"{bytes_text(num_bytes)} freed")
    return num_bytes


def stats(loaded: LoadedRun, say: Say) -> None:
    """Print what each folder holds and how much of it the configuration uses."""
    wanted = used_keys(loaded)
    files: dict[tuple[int, int], int] = {}  # a file with two names takes its room once
    unused: list[str] = []
    for folder, store in _stores(loaded, say):
        held = store.stats()
        for path in folder.path.glob("shard-*.safetensors"):
            status = path.stat()
            files[status.st_dev, status.st_ino] = status.st_size
        if not folder.datasets:
            unused.append(f"  {folder.path}: {_held(held)}")
        say(folder.label)
        shards = count_text(held.num_shards, "file")
        say(f"  {count_text(held.num_entries, 'entry', 'entries')} in {shards}, {bytes_text(held.num_bytes)}")
        if folder.datasets:
            keys, used = set(store.keys()), wanted.get(folder.path, set())
            say(f"  in use: {len(keys & used)}, unused: {len(keys - used)}, still to encode: {len(used - keys)}")
            if keys - used:
                unused.append(f"  {folder.path}: {len(keys - used)} of {_held(held)}")
        if folder.quarantined:
            size = bytes_text(sum(path.stat().st_size for path in folder.quarantined))
            say(f"  in quarantine as damaged: {count_text(len(folder.quarantined), 'file')}, {size}")
    say(f"{bytes_text(sum(files.values()))} in all")
    if unused:
        say("no longer used by this configuration (`simpletuner cache prune` removes it, with --others whole folders):")
        for line in unused:
            say(line)


def _held(held: StoreStats) -> str:
    return f"{count_text(held.num_entries, 'entry', 'entries')}, {bytes_text(held.num_bytes)}"


def used_keys(loaded: LoadedRun) -> dict[Path, set[str]]:
    """Folder -> keys of every image and caption that the configuration uses, at these weights and settings."""
    check_model_folder(loaded)
    family, cache_dir = build_family(loaded.config), Path(loaded.config.data.cache_dir)
    fingerprint = fingerprint_of_vae(family, cache_dir)
    keys: dict[Path, set[str]] = {}
    datasets = read_datasets(loaded, family)
    for dataset in datasets:
        for part in dataset.parts:
            folder = latents_folder(part.entry, cache_dir, family.spec)
            with TensorStore(folder) as store:
                cache = LatentCache(store, family, fingerprint)
                keys.setdefault(folder.resolve(), set()).update(map(cache.key, KeptSamples(dataset, part.id)))
    if family.spec.caches_prompt_embeds:
        prompts = open_prompt_cache(loaded, family)
        wanted = {prompts.key(request) for request in run_prompts(loaded, family, datasets)}
        keys.setdefault(prompts.store.folder.resolve(), set()).update(wanted)
        prompts.store.close()
    return keys


def _stores(loaded: LoadedRun, say: Say) -> Iterator[tuple[CacheFolder, TensorStore]]:
    folders = cache_folders(loaded)
    if not folders:
        say(f"there is no cache yet in {loaded.config.data.cache_dir}; `simpletuner cache build` makes it")
    for folder in folders:
        with closing(TensorStore(folder.path)) as store:
            yield folder, store


def _remove(paths: list[Path]) -> int:
    num_bytes = sum(path.stat().st_size for path in paths)
    for path in paths:
        path.unlink()
    return num_bytes


def _without_on_demand(loaded: LoadedRun) -> LoadedRun:
    config = loaded.config.with_values({"vae_cache_ondemand": False, "text_cache_ondemand": False})
    entries = tuple(
        entry.model_copy(update={"vae_cache_ondemand": False}) if isinstance(entry, ImageDataset) else entry
        for entry in loaded.datasets
    )
    return replace(loaded, config=config, datasets=entries)
