"""Cached latents: equal to what the VAE gives, keyed by all that makes them, independent of order and batch."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
import threading
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch

from simpletuner.batch import Crop, Sample
from simpletuner.cache import encoding
from simpletuner.cache import latents as latents_module
from simpletuner.cache.fingerprints import vae_fingerprint
from simpletuner.cache.latents import LatentCache, OnDemandLatents
from simpletuner.cache.store import DamagedEntry, StoreWriter, TensorStore
from simpletuner.data.digests import DigestMemo
from simpletuner.data.transforms import UnusableImage
from simpletuner.errors import DataError, Interrupted
from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.randomness import keyed_generator
from simpletuner.training.latents import DatasetLatents
from tests.tiny import tiny_vae

CPU = torch.device("cpu")
SPEC = get_spec("omnigen")


def make_family(model: str = "unused"):
    return get_family_class(SPEC)(SPEC, ModelSource(model), CPU, torch.float32)


class ImageInput:
    """A dataset of random images that counts what is read."""

    def __init__(self, count: int, sizes: tuple[tuple[int, int], ...] = ((32, 32),), broken: tuple[int, ...] = ()):
        self.samples = []
        for i in range(count):
            height, width = sizes[i % len(sizes)]
            crop = Crop(height + 8, width + 8, 4, 4, height, width)
            self.samples.append(Sample("set", f"{i}.png", f"{i:064x}", width, height, ("an image",), crop))
        self.broken = {f"{i}.png" for i in broken}
        self.read: list[str] = []

    def read_pixels(self, sample: Sample) -> torch.Tensor:
        self.read.append(sample.path)
        if sample.path in self.broken:
            raise UnusableImage("damaged: cut short")
        shape = (3, sample.crop.height, sample.crop.width)
        return torch.rand(shape, generator=keyed_generator(sample.digest)) * 2 - 1


@pytest.fixture
def cache(tmp_path):
    with TensorStore(tmp_path / "cache") as store:
        yield LatentCache(store, make_family(), "fingerprint")


def no_vae():
    raise AssertionError("the VAE was loaded although nothing is missing")


def test_the_cache_holds_what_the_vae_says_unscaled(cache):
    images = ImageInput(3)
    report = cache.fill(images, tiny_vae, batch_size=1)
    assert (report.num_encoded, report.num_cached, report.unusable) == (3, 0, ())
    assert 0 < report.seconds < 1e4
    with torch.no_grad():
        posterior = tiny_vae().encode(images.read_pixels(images.samples[1])[None]).latent_dist
    moments = cache.get(images.samples[1])
    assert torch.equal(moments.mean, posterior.mean[0])
    assert torch.equal(moments.std, posterior.std[0])
    assert moments.mean.shape == (4, 4, 4)


def test_a_full_cache_loads_no_vae_and_reads_no_image(cache):
    cache.fill(ImageInput(3), tiny_vae, batch_size=2)
    images = ImageInput(3)
    report = cache.fill(images, no_vae, batch_size=2)
    assert (report.num_encoded, report.num_cached) == (0, 3)
    assert images.read == []


def test_the_same_image_and_crop_is_encoded_once(cache):
    images = ImageInput(2)
    images.samples.append(dataclasses.replace(images.samples[0], dataset_id="other", path="copy.png"))
    report = cache.fill(images, tiny_vae, batch_size=2)
    assert report.num_encoded == 2
    assert torch.equal(cache.get(images.samples[2]).mean, cache.get(images.samples[0]).mean)


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_latents_do_not_depend_on_order_company_or_time_of_encoding(tmp_path, batch_size):
    """Bit for bit: filled in one go, in reverse, a few at a time, and on demand."""
    sizes = ((32, 32), (32, 48))
    images, backwards, part = ImageInput(11, sizes), ImageInput(11, sizes), ImageInput(11, sizes)
    backwards.samples.reverse()
    part.samples = part.samples[3:5]
    caches = [LatentCache(TensorStore(tmp_path / name), make_family(), "f") for name in "abcd"]
    caches[0].fill(images, tiny_vae, batch_size)
    caches[1].fill(backwards, tiny_vae, batch_size)
    caches[2].fill(part, tiny_vae, batch_size)
    caches[2].fill(images, tiny_vae, batch_size)
    with OnDemandLatents(caches[3], images, tiny_vae(), batch_size) as on_demand:
        on_demand.get(images.samples[6])
        on_demand.get_many([images.samples[i] for i in (1, 6, 4)])
        for sample in images.samples:
            on_demand.get(sample)
    for sample in images.samples:
        first, *others = [each.get(sample) for each in caches]
        assert all(torch.equal(first.mean, other.mean) and torch.equal(first.std, other.std) for other in others)


def test_every_batch_has_the_same_size(cache, monkeypatch):
    shapes = []
    family = cache.family
    real = family.encode_images
    monkeypatch.setattr(family, "encode_images", lambda vae, x: shapes.append(tuple(x.shape)) or real(vae, x))
    cache.fill(ImageInput(5, ((32, 32), (16, 32))), tiny_vae, batch_size=4)
    assert shapes == [(4, 3, 16, 32), (4, 3, 32, 32)]


@pytest.mark.parametrize(
    "change",
    [
        {"digest": "f" * 64},
        {"crop": {"intermediate_height": 41}},
        {"crop": {"intermediate_width": 41}},
        {"crop": {"top": 5}},
        {"crop": {"left": 5}},
        {"crop": {"height": 24}},
        {"crop": {"width": 24}},
        {"fingerprint": "another vae"},
        {"transform": 999},
        {"schema": 999},
    ],
    ids=lambda change: "-".join(map(str, change)),
)
def test_any_change_of_what_makes_latents_gives_another_key(cache, monkeypatch, change):
    sample = ImageInput(1).samples[0]
    before = cache.key(sample)
    if "digest" in change:
        sample = dataclasses.replace(sample, digest=change["digest"])
    if "crop" in change:
        sample = dataclasses.replace(sample, crop=dataclasses.replace(sample.crop, **change["crop"]))
    cache.fingerprint = change.get("fingerprint", cache.fingerprint)
    if "transform" in change:
        monkeypatch.setattr(latents_module, "TRANSFORM_VERSION", change["transform"])
    if "schema" in change:
        monkeypatch.setattr(latents_module, "SCHEMA_VERSION", change["schema"])
    assert cache.key(sample) != before


def test_name_caption_and_data_set_do_not_touch_the_key(cache):
    sample = ImageInput(1).samples[0]
    other = dataclasses.replace(sample, path="renamed.png", captions=("new",), dataset_id="other")
    assert cache.key(other) == cache.key(sample)


def test_what_cannot_be_read_or_encoded_is_reported_and_the_rest_is_cached(cache, monkeypatch):
    images = ImageInput(6, broken=(2,))
    family = cache.family
    real = family.encode_images

    def encode(vae, pixel_values):
        moments = real(vae, pixel_values)
        poisoned = images.read_pixels(images.samples[4])
        return [
            dataclasses.replace(each, mean=each.mean * float("nan")) if torch.equal(pixels, poisoned) else each
            for each, pixels in zip(moments, pixel_values, strict=True)
        ]

    monkeypatch.setattr(family, "encode_images", encode)
    images.samples.append(dataclasses.replace(images.samples[2], path="2.png", dataset_id="again"))
    report = cache.fill(images, tiny_vae, batch_size=4)
    assert report.num_encoded == 4
    reported = {(each.sample.path, each.sample.dataset_id): each.reason for each in report.unusable}
    assert reported.keys() == {("2.png", "set"), ("2.png", "again"), ("4.png", "set")}
    assert reported[("2.png", "set")] == "damaged: cut short"
    assert "NaN" in reported[("4.png", "set")]
    assert cache.get(images.samples[5]).mean.isfinite().all()
    with pytest.raises(DataError, match=r"4\.png"):
        cache.get(images.samples[4])


def test_latents_that_overflow_in_half_precision_are_tried_once_in_float32(cache):
    class Overflowing(torch.nn.Module):
        """Says infinity unless it is in float32, like VAEs whose activations leave half precision's range."""

        config = {"scaling_factor": 1.0}

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        @property
        def dtype(self):
            return self.scale.dtype

        @property
        def device(self):
            return self.scale.device

        def encode(self, x):
            mean = x[:, :, ::8, ::8] * self.scale * (1.0 if self.dtype == torch.float32 else float("inf"))
            posterior = type("Posterior", (), {"mean": mean, "std": torch.ones_like(mean)})
            return type("Output", (), {"latent_dist": posterior})

    vae = Overflowing().to(torch.bfloat16)
    images = ImageInput(3)
    report = cache.fill(images, lambda: vae, batch_size=2)
    assert (report.num_encoded, report.unusable) == (3, ())
    pixels = images.read_pixels(images.samples[2])
    assert torch.equal(cache.get(images.samples[2]).mean, pixels[:, ::8, ::8])
    assert vae.dtype == torch.bfloat16


def test_too_little_memory_names_the_key_to_change(cache, monkeypatch):
    def encode(vae, pixel_values):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cache.family, "encode_images", encode)
    with pytest.raises(DataError, match="vae_batch_size"):
        cache.fill(ImageInput(2), tiny_vae, batch_size=2)


def test_progress_counts_everything_and_may_stop_the_work(cache):
    cache.fill(ImageInput(2), tiny_vae, batch_size=2)
    seen = []

    def report(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 6:
            raise Interrupted("stopped by a signal")

    with pytest.raises(Interrupted):
        cache.fill(ImageInput(9), tiny_vae, batch_size=2, report=report)
    assert seen == [(4, 9), (6, 9)]
    assert len(cache.store.keys()) == 6


def test_a_full_disk_is_reported_before_anything_is_encoded(cache, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"the latent cache needs 1.5 KiB, and only 1000 bytes are free"):
        cache.fill(ImageInput(3), no_vae, batch_size=2)


def _damage(cache: LatentCache) -> None:
    (shard,) = cache.store.folder.glob("shard-*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)


def test_a_flipped_bit_is_encoded_again_by_the_next_fill(cache):
    images = ImageInput(3)
    cache.fill(images, tiny_vae, batch_size=2)
    before = [cache.get(sample) for sample in images.samples]
    _damage(cache)
    damaged = cache.store.verify()
    assert len(damaged) == 1
    images.read.clear()
    assert cache.fill(images, tiny_vae, batch_size=2).num_encoded == 1
    assert len(images.read) == 1
    for sample, moments in zip(images.samples, before, strict=True):
        assert torch.equal(cache.get(sample).std, moments.std)


def test_on_demand_encodes_a_damaged_entry_again_and_keeps_what_it_encodes(cache):
    images = ImageInput(3)
    cache.fill(images, tiny_vae, batch_size=2)
    before = [cache.get(sample).std for sample in images.samples]
    _damage(cache)
    with OnDemandLatents(cache, images, tiny_vae(), batch_size=2) as on_demand:
        after = [on_demand.get(sample).std for sample in images.samples]
    assert all(map(torch.equal, before, after))
    assert [torch.equal(cache.get(sample).std, std) for sample, std in zip(images.samples, before, strict=True)]
    images.read.clear()
    with OnDemandLatents(cache, images, tiny_vae(), batch_size=2) as on_demand:
        on_demand.get_many(images.samples)
    assert images.read == []


def test_damage_met_in_training_says_that_a_new_start_fixes_it(cache):
    images = ImageInput(1)
    cache.fill(images, tiny_vae, batch_size=1)
    _damage(cache)
    with pytest.raises(DamagedEntry, match="start again"):
        cache.get(images.samples[0])


def test_on_demand_names_the_image_that_cannot_be_read(cache):
    images = ImageInput(2, broken=(1,))
    with (
        OnDemandLatents(cache, images, tiny_vae(), batch_size=2) as on_demand,
        pytest.raises(DataError, match=r"1\.png cannot be encoded: damaged"),
    ):
        on_demand.get(images.samples[1])


def test_what_on_demand_has_not_written_yet_is_not_encoded_twice(cache):
    images = ImageInput(1)
    with OnDemandLatents(cache, images, tiny_vae(), batch_size=2) as on_demand:
        on_demand.get(images.samples[0])
        on_demand.get(images.samples[0])
        assert images.read == ["0.png"]


# ---- kill -9 and company -------------------------------------------------------------------------------------------


class Eager(StoreWriter):
    """Commits every four entries."""

    def __init__(self, tensors: TensorStore, **options: object):
        super().__init__(tensors, max_entries=4)


def _start_filling(folder: Path, stays: bool = False) -> tuple[ForkProcess, Connection]:
    """Fill a cache with 24 images in a fork; it sends how many are done, and may stay with the fourteenth."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def report(done: int, total: int) -> None:
        sending.send(done)
        if stays and done >= 14:
            time.sleep(600)

    def fill() -> None:
        latents_module.StoreWriter = Eager  # type: ignore[misc]
        with TensorStore(folder) as tensors:
            LatentCache(tensors, make_family(), "fingerprint").fill(ImageInput(24), tiny_vae, 2, report)

    filling = context.Process(target=fill)
    filling.start()
    sending.close()
    return filling, receiving


def test_kill_9_while_filling_loses_nothing_that_was_written(cache):
    filling, reports = _start_filling(cache.store.folder, stays=True)
    while reports.recv() < 14:
        pass
    filling.kill()
    filling.join()
    images = ImageInput(24)
    there = 24 - len(cache.store.missing(map(cache.key, images.samples)))
    assert 4 <= there < 24
    assert cache.store.verify() == []
    report = cache.fill(images, tiny_vae, batch_size=2)
    assert (report.num_cached, report.num_encoded) == (there, 24 - there)
    assert len(images.read) == 24 - there
    with TensorStore(cache.store.folder):
        assert not list(cache.store.folder.glob(".tmp-*"))


def test_two_processes_fill_one_cache_at_once(cache, tmp_path):
    both = [_start_filling(cache.store.folder) for _ in range(2)]
    for each, _ in both:
        each.join()
        assert each.exitcode == 0
    assert cache.fill(ImageInput(24), no_vae, batch_size=2).num_cached == 24
    assert cache.store.verify() == []
    alone = LatentCache(TensorStore(tmp_path / "alone"), make_family(), "fingerprint")
    alone.fill(ImageInput(24), tiny_vae, batch_size=2)
    for sample in ImageInput(24).samples:
        assert torch.equal(cache.get(sample).mean, alone.get(sample).mean)


# ---- the fingerprint -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path):
    tiny_vae().save_pretrained(tmp_path / "model" / "vae")
    return tmp_path / "model"


def _fingerprint(model: Path, memo: DigestMemo, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> str:
    return vae_fingerprint(ModelSource(str(model)), SPEC, memo, device, dtype)


@pytest.fixture
def memo(tmp_path):
    with DigestMemo(tmp_path / "memo.sqlite") as memo:
        yield memo


def _edit_config(model: Path, **changes: object) -> None:
    path = model / "vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_other_weights_and_other_ways_to_encode_give_another_fingerprint(model, memo, monkeypatch):
    seen = {_fingerprint(model, memo), _fingerprint(model, memo, dtype=torch.bfloat16)}
    seen.add(_fingerprint(model, memo, device=torch.device("cuda")))
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    seen.add(_fingerprint(model, memo))
    monkeypatch.undo()
    _edit_config(model, norm_num_groups=2)
    seen.add(_fingerprint(model, memo))
    _edit_config(model, _class_name="AnotherAutoencoder")
    seen.add(_fingerprint(model, memo))
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    time.sleep(0.01)
    seen.add(_fingerprint(model, memo))
    assert len(seen) == 7


def test_scale_shift_and_notes_leave_the_fingerprint_alone(model, memo):
    before = _fingerprint(model, memo)
    _edit_config(model, scaling_factor=0.5, shift_factor=0.1, _diffusers_version="9.9", _name_or_path="elsewhere")
    assert _fingerprint(model, memo) == before


def test_on_a_gpu_the_number_of_threads_does_not_matter(model, memo, monkeypatch):
    before = _fingerprint(model, memo, device=torch.device("cuda"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    assert _fingerprint(model, memo, device=torch.device("cuda")) == before


def test_a_vae_without_safetensors_is_reported(model, memo):
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(DataError, match="holds no safetensors weights"):
        _fingerprint(model, memo)


def test_an_accelerator_gets_a_reader_for_each_core_and_the_cpu_two(monkeypatch):
    monkeypatch.setattr(encoding, "available_cores", lambda: 12)
    assert encoding.num_readers(CPU) == 2
    assert encoding.num_readers(torch.device("cuda")) == 12
    assert encoding.num_readers(torch.device("cuda"), num_processes=4) == 3
    assert encoding.num_readers(torch.device("cuda"), num_processes=12) == 2
    monkeypatch.setattr(encoding, "available_cores", lambda: 96)
    assert encoding.num_readers(torch.device("cuda")) == 16


def test_images_that_are_encoded_on_demand_are_read_at_the_same_time(cache):
    images = ImageInput(4)
    both_read = threading.Barrier(2, timeout=300)
    read = images.read_pixels

    def read_in_pairs(sample):
        both_read.wait()
        return read(sample)

    images.read_pixels = read_in_pairs
    with OnDemandLatents(cache, images, tiny_vae(), batch_size=2) as on_demand:
        assert len(on_demand.get_many(images.samples)) == 4


def test_a_latent_that_is_missing_from_a_complete_cache_makes_the_next_start_look(cache):
    images = ImageInput(2)
    cache.fill(images, tiny_vae, batch_size=2)
    cache.store.note_complete("all", 2)
    for shard in cache.store.folder.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(DataError, match="start again"):
        cache.get(images.samples[0])
    assert cache.store.complete("all") is None
    cache.store.note_complete("all", 2)  # of an index that was made again before, and is believed from then on
    with pytest.raises(DataError, match="start again"):
        cache.get(images.samples[0])
    assert cache.store.complete("all") is None


def test_two_crops_of_an_image_and_its_mirror_have_latents_of_their_own(cache):
    images = ImageInput(1)
    [sample] = images.samples
    moved = replace(sample, crop=replace(sample.crop, top=0))
    cache.family.vae_config = dict(tiny_vae().config)
    source = DatasetLatents(cache, images.read_pixels, tiny_vae, 1, seed=1)
    source.encode_on_demand()
    found = [source.latents([each])[0] for each in (sample, moved, sample.mirrored(), sample)]
    assert found[0] is found[3]  # in memory
    assert len({id(each) for each in found}) == 3
    assert not torch.equal(found[0], found[1])  # the draws from what the VAE says are keyed apart
    source.close()
