"""What is cached is never stale, never made twice, and survives a kill: through the verbs that people use."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from simpletuner.cache.encoding import BatchEncoder
from simpletuner.data.dataset import Dataset
from simpletuner.data.kept import KeptSamples
from simpletuner.data.sampler import Sampler
from simpletuner.models.build import build_family
from simpletuner.reporting.bus import EventBus
from simpletuner.training.prepare import prepare_data
from simpletuner.training.process import Process
from simpletuner.training.run_history import FolderGuard
from simpletuner.training.signals import StopRequest
from tests.runs import dataset, load_here, run_forked, slow_but, write_images, write_run

COUNT = 4


@pytest.fixture
def folder(tmp_path: Path, omnigen_folder: Path) -> Path:
    """A run with a model of its own, for tests that change the model, and images whose files all have one size."""
    model = shutil.copytree(omnigen_folder, tmp_path / "model")
    folder = tmp_path / "run"
    write_images(folder / "drawn", COUNT, seed=1, side=96)
    (folder / "images").mkdir()
    for path in sorted((folder / "drawn").glob("*.png")):
        with Image.open(path) as image:
            image.resize((96, 64)).save(folder / "images" / f"{path.stem}.bmp")
        (folder / "images" / f"{path.stem}.txt").write_text(f"caption {path.stem}")
    return write_run(folder, model, [dataset("images", crop=True)])


class Counter:
    """Counts the images that a VAE sees."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.images = 0
        encode = BatchEncoder.encode

        def count(encoder: BatchEncoder, images: list[Tensor]):
            self.images += len(images)
            return encode(encoder, images)

        monkeypatch.setattr(BatchEncoder, "encode", count)


def read(folder: Path, cache_dir: str = "cache") -> tuple[Dataset, dict[str, Tensor], dict[str, list[int]]]:
    """The dataset, its latents by path and its token ids by path, as a training run gets them."""
    loaded = load_here(folder, f"--cache_dir={cache_dir}")
    family = build_family(loaded.config)
    (folder / "output").mkdir(exist_ok=True)
    process = Process(guard=FolderGuard(folder / "output"), bus=EventBus(), stop=StopRequest())
    [each], sources = prepare_data(loaded, family, process)
    samples = list(each.samples)
    latents = sources[each.id].latents(samples)
    prompts = family.encode_prompts([sample.captions[0] for sample in samples])
    paths = [sample.path for sample in samples]
    ids = [prompt.tensors["input_ids"].tolist() for prompt in prompts]
    return each, dict(zip(paths, latents, strict=True)), dict(zip(paths, ids, strict=True))


def entry(folder: Path, **keys: object) -> None:
    path = folder / "multidatabackend.json"
    [first] = json.loads(path.read_text())
    path.write_text(json.dumps([first | keys]))


def option(folder: Path, **options: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


def same_size_and_time(path: Path, data: bytes) -> None:
    """Other bytes under the same name, size and time of last write."""
    status = path.stat()
    assert len(data) == status.st_size
    assert data != path.read_bytes()
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_image(folder: Path) -> None:
    path = folder / "images/001.bmp"
    data = bytearray(path.read_bytes())
    data[200:8000] = bytes(255 - value for value in data[200:8000])
    same_size_and_time(path, bytes(data))


def swap_images(folder: Path) -> None:
    first, second = folder / "images/001.bmp", folder / "images/002.bmp"
    one, two = first.read_bytes(), second.read_bytes()
    same_size_and_time(first, two)
    same_size_and_time(second, one)


def change_vae(folder: Path) -> None:
    [path] = (folder.parent / "model/vae").glob("*.safetensors")
    tensors = load_file(path)
    tensors["encoder.conv_in.weight"] = tensors["encoder.conv_in.weight"] * 1.5
    status = path.stat()
    save_file(tensors, path, metadata={"format": "pt"})
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def change_vae_config(folder: Path) -> None:
    path = folder.parent / "model/vae/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"norm_num_groups": 2}))


# What is changed, and how many of the images must be encoded again.
MATRIX: dict[str, tuple[Callable[[Path], object], int]] = {
    "nothing": (lambda folder: None, 0),
    "the bytes of one image": (change_image, 1),
    "two images swapped": (swap_images, 0),
    "an image renamed": (lambda f: (f / "images/001.bmp").rename(f / "images/001b.bmp"), 0),
    "a caption": (lambda f: (f / "images/001.txt").write_text("other words"), 0),
    "the place of the crop": (lambda f: entry(f, crop_style="corner"), COUNT),
    "a random crop": (lambda f: entry(f, crop_style="random"), COUNT),
    "the shape of the crop": (lambda f: entry(f, crop_aspect="preserve"), COUNT),
    "no crop": (lambda f: entry(f, crop=False), COUNT),
    "the resolution": (lambda f: entry(f, resolution=80), COUNT),
    "how the resolution is measured": (lambda f: entry(f, resolution=0.0064, resolution_type="area"), COUNT),
    "the weights of the VAE": (change_vae, COUNT),
    "the configuration of the VAE": (change_vae_config, COUNT),
    "repeats": (lambda f: entry(f, repeats=3), 0),
    "tiles": (lambda f: option(f, vae_enable_tiling=True), COUNT),
    "slices": (lambda f: option(f, vae_enable_slicing=True), COUNT),
    "how many are written at once": (lambda f: option(f, write_batch_size=1), 0),
}


# Of the rest each says little that these do not.
QUICK = ("the bytes of one image", "two images swapped", "a caption", "the place of the crop", "the weights of the VAE")


@pytest.mark.parametrize("what", slow_but(MATRIX, QUICK))
def test_after_a_change_nothing_stale_is_used_and_nothing_is_made_twice(folder, monkeypatch, what):
    change, num_encoded = MATRIX[what]
    read(folder)
    time.sleep(0.06)  # digests of files younger than the tick of their time stamps are not remembered
    read(folder)
    change(folder)
    if what == "an image renamed":
        (folder / "images/001.txt").rename(folder / "images/001b.txt")
    counter = Counter(monkeypatch)
    _, latents, ids = read(folder)
    assert counter.images == num_encoded
    _, fresh, fresh_ids = read(folder, "fresh")
    assert latents.keys() == fresh.keys()
    assert all(torch.equal(latents[path], fresh[path]) for path in fresh)
    assert ids == fresh_ids


def test_a_start_on_a_complete_cache_asks_for_no_single_image(folder, monkeypatch):
    """So it takes no longer with a million images; what is gone from the folder is noticed all the same."""
    read(folder)
    gone_through: list[str] = []
    every = KeptSamples.__iter__

    def note(kept: KeptSamples):
        gone_through.append(kept.part_id)
        return every(kept)

    monkeypatch.setattr(KeptSamples, "__iter__", note)
    _, before, _ = read(folder)
    assert gone_through == []
    next((folder / "cache/vae/omnigen/images").glob("shard-*.safetensors")).unlink()
    counter = Counter(monkeypatch)
    _, after, _ = read(folder)
    assert counter.images == COUNT
    assert all(torch.equal(after[path], before[path]) for path in before)


def read_references(folder: Path, cache_dir: str = "cache") -> list[Tensor]:
    """The latents of the references of all images, in their order."""
    loaded = load_here(folder, f"--cache_dir={cache_dir}")
    (folder / "output").mkdir(exist_ok=True)
    process = Process(guard=FolderGuard(folder / "output"), bus=EventBus(), stop=StopRequest())
    [each], sources = prepare_data(loaded, build_family(loaded.config), process)
    return [sources["sources"].latents(sample.references)[0] for sample in each.samples]


@pytest.mark.parametrize("kind", ["reference_strict", "reference_loose"])
def test_a_reference_image_is_never_stale_and_never_made_twice(folder, monkeypatch, kind):
    """Other bytes under the same name, size and time are one image to encode; the images beside it stay."""
    shutil.copytree(folder / "images", folder / "sources")
    entry(folder, conditioning_data="sources")
    path = folder / "multidatabackend.json"
    sources = {"id": "sources", "dataset_type": "conditioning", "instance_data_dir": "sources"}
    path.write_text(json.dumps([*json.loads(path.read_text()), sources | {"conditioning_type": kind}]))
    before = read_references(folder)
    counter = Counter(monkeypatch)
    assert all(map(torch.equal, read_references(folder), before))
    assert counter.images == 0
    image = folder / "sources/001.bmp"
    data = bytearray(image.read_bytes())
    data[200:8000] = bytes(255 - value for value in data[200:8000])
    same_size_and_time(image, bytes(data))
    after = read_references(folder)
    assert counter.images == 1
    assert [torch.equal(*each) for each in zip(before, after, strict=True)] == [True, False, True, True]
    assert all(map(torch.equal, read_references(folder, "fresh"), after))


def test_a_new_scale_needs_no_encoding_and_is_applied(folder, monkeypatch):
    _, before, _ = read(folder)
    path = folder.parent / "model/vae/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"scaling_factor": 2 * config["scaling_factor"]}))
    counter = Counter(monkeypatch)
    _, after, _ = read(folder)
    assert counter.images == 0
    assert all(torch.allclose(after[path], 2 * before[path]) for path in before)


def test_the_number_format_of_the_vae_is_part_of_every_key(folder):
    from simpletuner.cache.fingerprints import vae_fingerprint
    from simpletuner.data.digests import DigestMemo

    family = build_family(load_here(folder).config)
    with DigestMemo(folder / "memo.sqlite") as memo:
        formats = (torch.float32, torch.bfloat16, torch.float16)
        prints = {vae_fingerprint(family.source, family.spec, memo, family.device, dtype) for dtype in formats}
    assert len(prints) == 3


def test_another_caption_tokenizer_or_template_is_seen_at_once(folder, monkeypatch):
    _, _, before = read(folder)
    (folder / "images/001.txt").write_text("other words")
    _, _, ids = read(folder)
    assert [path for path in ids if ids[path] != before[path]] == ["001.bmp"]

    path = folder.parent / "model/tokenizer/tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    used = [token for token, number in vocabulary.items() if number in ids["000.bmp"] and number in ids["001.bmp"]]
    first, second = used[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    _, _, other = read(folder)
    assert all(other[path] != ids[path] for path in ids)

    monkeypatch.setattr("simpletuner.models.omnigen.tokens.PREFIX", "<|user|>\nDraw this\n")
    _, _, another = read(folder)
    assert all(another[path] != other[path] for path in ids)


def test_images_of_one_stem_both_train(folder, monkeypatch):
    images = folder / "images"
    with Image.open(images / "001.bmp") as first, Image.open(images / "002.bmp") as second:
        for name in ("000", "001", "002", "003"):
            (images / f"{name}.bmp").unlink()
        first.save(images / "a.png")
        second.convert("RGB").save(images / "a.jpg")
    (images / "a.txt").write_text("both")
    counter = Counter(monkeypatch)
    each, latents, _ = read(folder)
    assert counter.images == 2
    assert not torch.equal(latents["a.png"], latents["a.jpg"])
    plan = Sampler([each], 2, 0).batch(0, 0)
    assert {each.samples[index].path for index in plan.sample_indices} == {"a.png", "a.jpg"}


# Small shards and a slow VAE, so that a kill comes between two of them.
BUILD_THAT_STAYS = """
import sys, time
from simpletuner import cli
from simpletuner.cache import encoding, latents, store
class Eager(store.StoreWriter):
    def __init__(self, tensors, **options):
        super().__init__(tensors, max_entries=4)
latents.StoreWriter = Eager
encode, batches = encoding.BatchEncoder.encode, []
def stays(self, images):
    batches.append(images)
    if len(batches) > 10:
        time.sleep(600)
    return encode(self, images)
encoding.BatchEncoder.encode = stays
sys.argv = ["simpletuner", "cache", "build", "--vae_batch_size=2"]
cli.main()
"""


def cached_keys(folder: Path) -> dict[str, Tensor]:
    """Every tensor in the shards, read with the public library."""
    found: dict[str, Tensor] = {}
    for shard in (folder / "cache/vae/omnigen/images").glob("shard-*.safetensors"):
        with safe_open(shard, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return found


@pytest.mark.slow
def test_after_kill_9_a_second_build_encodes_only_what_is_missing(tmp_path, omnigen_folder):
    total = 40
    folders = [tmp_path / name for name in ("killed", "undisturbed")]
    for folder in folders:
        write_images(folder / "images", total, seed=1)
        write_run(folder, omnigen_folder, [dataset("images")])
    killed, undisturbed = folders
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", BUILD_THAT_STAYS], cwd=killed, env=environment, stdout=-1) as building:
        deadline = time.monotonic() + 240
        while len(cached_keys(killed)) < 2 * 8 and time.monotonic() < deadline:
            time.sleep(0.02)
        building.send_signal(signal.SIGKILL)
    there = len(cached_keys(killed)) // 2
    assert 8 <= there < total
    outputs = [run_forked(folder, "cache", "build", "--vae_batch_size=2") for folder in folders]
    assert [output.returncode for output in outputs] == [0, 0]
    assert re.search(rf"{total - there} encoded, {there} cached before", outputs[0].stdout)
    first, second = cached_keys(killed), cached_keys(undisturbed)
    assert len(first) == 2 * total
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("keeps", [True, False])
def test_latents_that_are_encoded_on_demand_are_written_where_the_dataset_says_so(folder: Path, keeps: bool) -> None:
    entry(folder, **({"vae_cache_ondemand": True} if keeps else {"vae_cache_disable": True}))
    loaded = load_here(folder)
    family = build_family(loaded.config)
    (folder / "output").mkdir(exist_ok=True)
    process = Process(guard=FolderGuard(folder / "output"), bus=EventBus(), stop=StopRequest())
    [each], sources = prepare_data(loaded, family, process)
    assert len(sources[each.id].latents(list(each.samples))) == COUNT
    sources[each.id].close()
    assert bool(list((folder / "cache/vae").rglob("*.safetensors"))) == keeps
