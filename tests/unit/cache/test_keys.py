"""What tells latents apart, and what is kept of them."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch

from simpletuner.batch import Crop, PromptImage, PromptRequest, Sample
from simpletuner.cache import encoded, encoding, fingerprints, latents
from simpletuner.cache.encoding import BatchEncoder
from simpletuner.cache.fingerprints import vae_fingerprint
from simpletuner.cache.latents import LatentCache, OnDemandLatents
from simpletuner.cache.prompts import PromptCache
from simpletuner.cache.store import TensorStore
from simpletuner.data.digests import DigestMemo
from simpletuner.models.components import ModelSource
from simpletuner.models.family import LatentMoments
from tests.tiny import tiny_vae
from tests.unit.cache.test_latents import CPU, SPEC, ImageInput, make_family


@pytest.fixture
def cache(tmp_path):
    with TensorStore(tmp_path / "cache") as store:
        yield LatentCache(store, make_family(), "fingerprint")


def test_of_two_images_the_one_that_does_not_overflow_keeps_its_bits(cache):
    """In float32 both would come out one larger: only the one that needs it is taken from there."""

    class Half(torch.nn.Module):
        config = {"scaling_factor": 1.0}

        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def encode(self, x):
            mean = x[:, :1, ::8, ::8].float()
            mean = mean + 1 if self.scale.dtype == torch.float32 else torch.where(mean > 0.5, torch.inf, mean)
            posterior = type("Posterior", (), {"mean": mean, "std": torch.ones_like(mean)})
            return type("Output", (), {"latent_dist": posterior})

    encoder = BatchEncoder(cache.family, Half().to(torch.bfloat16), 3)
    small, large = torch.full((3, 16, 16), 0.25), torch.full((3, 16, 16), 0.75)
    first, second = encoder.encode([small, large])
    assert first.mean.unique().tolist() == [0.25]
    assert second.mean.unique().tolist() == [1.75]


def test_a_mirrored_image_has_latents_of_its_own(cache):
    [sample] = ImageInput(1).samples
    assert cache.key(sample.mirrored()) != cache.key(sample)
    assert cache.key(sample.mirrored().mirrored()) == cache.key(sample)


def test_tiles_and_slices_are_another_way_to_encode(omnigen_folder, tmp_path):
    modes = [(), ("tiling",), ("slicing",), ("slicing", "tiling")]
    with DigestMemo(tmp_path / "digests.sqlite") as memo:
        source = ModelSource(str(omnigen_folder))
        found = {vae_fingerprint(source, SPEC, memo, CPU, torch.float32, mode) for mode in modes}
    assert len(found) == 4


def test_an_image_that_samples_far_apart_share_is_one_entry(cache, monkeypatch):
    monkeypatch.setattr(latents, "_SAMPLES_AT_ONCE", 2)
    samples = ImageInput(3).samples
    need = cache.need([*samples, *samples])
    assert (need.num_entries, need.num_missing) == (3, 3)


@pytest.mark.parametrize("keeps", [True, False])
def test_on_demand_writes_only_where_it_may(cache, keeps):
    images = ImageInput(1)
    with OnDemandLatents(cache, images, tiny_vae(), batch_size=1, keeps=keeps) as latents_of:
        latents_of.get(images.samples[0])
    assert (cache.key(images.samples[0]) in cache.store) == keeps


def test_a_deviation_that_is_infinite_makes_an_image_unusable():
    mean = torch.zeros(1, 2, 2)
    assert encoding._is_finite(LatentMoments(mean, mean))
    assert encoding._is_finite(LatentMoments(mean))
    assert not encoding._is_finite(LatentMoments(mean, mean + torch.inf))
    assert not encoding._is_finite(LatentMoments(mean + torch.nan, mean))
    assert not encoding._is_finite(LatentMoments(mean - torch.inf))


def test_what_is_complete_is_so_for_one_version_one_encoder_and_one_set(cache, monkeypatch):
    names = {cache.set_fingerprint("a", 1), cache.set_fingerprint("a", 2)}
    names.add(LatentCache(cache.store, cache.family, "another VAE").set_fingerprint("a", 1))
    monkeypatch.setattr(encoded, "__version__", "9.9.9")
    names.add(cache.set_fingerprint("a", 1))
    assert len(names) == 4


def test_the_order_of_a_content_decides_no_key(cache):
    assert cache.digest({"a": 1, "b": 2}) == cache.digest({"b": 2, "a": 1}) != cache.digest({"a": 1, "b": 3})


def test_what_is_missing_and_its_room_by_hand(cache, tmp_path):
    """Three images of 32 x 32: latents of 4 x 4 x 4 numbers, mean and deviation, are 512 bytes in float32."""
    images = ImageInput(3)
    part = ImageInput(1)
    cache.fill(part, tiny_vae, batch_size=1)
    need = cache.need(images.samples)
    assert (need.num_entries, need.num_missing, need.bytes_missing) == (3, 2, 2 * 512)
    other = LatentCache(TensorStore(tmp_path / "other"), cache.family, "fingerprint")
    rest = ImageInput(2)
    del rest.samples[0]
    other.fill(rest, tiny_vae, batch_size=1)
    need = cache.need(images.samples, [other.store])
    assert (need.num_missing, need.bytes_missing) == (1, 512)
    assert cache.adopt(images.samples, [other.store]) == 1
    assert cache.need(images.samples).num_missing == 1


def test_images_of_one_height_are_sorted_by_their_width(cache, monkeypatch):
    shapes, real = [], cache.family.encode_images
    monkeypatch.setattr(cache.family, "encode_images", lambda vae, x: shapes.append(tuple(x.shape[2:])) or real(vae, x))
    cache.fill(ImageInput(4, ((32, 48), (32, 32))), tiny_vae, batch_size=2)
    assert shapes == [(32, 32), (32, 48)]


def test_latents_on_demand_come_in_the_order_of_their_samples_each_as_often_as_asked_for(cache):
    images = ImageInput(2)
    first, second = images.samples
    with OnDemandLatents(cache, images, tiny_vae(), batch_size=2) as latents_of:
        wanted = [second, first, second]
        found = latents_of.get_many(wanted)
        assert all(
            torch.equal(each.mean, latents_of.get(sample).mean) for each, sample in zip(found, wanted, strict=True)
        )
    assert len(found) == 3


def test_an_image_that_cannot_be_read_is_tried_once_in_a_fill(cache, monkeypatch):
    monkeypatch.setattr(latents, "_SAMPLES_AT_ONCE", 1)
    images = ImageInput(2, broken=(0,))
    report = cache.fill(images, tiny_vae, batch_size=1)
    assert (report.num_encoded, images.read.count("0.png")) == (1, 1)


def prompt_digest(tmp_path, monkeypatch, **changes) -> str:
    """The fingerprint of an encoder, a tokenizer and a processor that are files of a few bytes."""
    facts = {"weights": "w", "config": {"layers": 2}, "tokenizer": "t", "processor": "p", "limit": 77, "bits": "bf16"}
    facts |= {"attention": None, "dtype": torch.float32, **changes}
    parts = [SimpleNamespace(name="text_encoder", role="text_encoder", attention=facts["attention"])]
    parts += [SimpleNamespace(name=name, role=name) for name in ("tokenizer", "processor")]
    parts.append(SimpleNamespace(name="vae", role="vae"))  # no part of it
    for name in ("weights", "tokenizer", "processor"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "file").write_text(facts[name])
    family = SimpleNamespace(
        source=SimpleNamespace(parts=lambda spec: parts),
        spec=None,
        prompt_facts=lambda: {"limit": facts["limit"]},
        encoders=SimpleNamespace(precision=lambda name: facts["bits"]),
        device=CPU,
        dtype=facts["dtype"],
    )
    monkeypatch.setattr(fingerprints, "component_config", lambda source, part: facts["config"])
    monkeypatch.setattr(fingerprints, "weight_files", lambda source, part: [tmp_path / "weights" / "file"])
    monkeypatch.setattr(fingerprints, "component_folder", lambda source, part: tmp_path / part.name)
    memo = SimpleNamespace(digest=lambda path: path.read_text())
    return fingerprints.prompt_fingerprint(family, memo)


def test_a_prompt_s_encoders_are_told_apart_by_all_that_decides_their_results(tmp_path, monkeypatch):
    changes = [
        *({}, {"weights": "x"}, {"config": {"layers": 3}}, {"tokenizer": "x"}, {"processor": "x"}, {"limit": 78}),
        *({"bits": "int8"}, {"attention": "eager"}, {"dtype": torch.bfloat16}),
    ]
    assert len({prompt_digest(tmp_path, monkeypatch, **each) for each in changes}) == len(changes)
    noted = {"config": {"layers": 2, "_name_or_path": "elsewhere"}}
    assert prompt_digest(tmp_path, monkeypatch, **noted) == prompt_digest(tmp_path, monkeypatch)


def sha256_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def test_the_key_of_an_entry_is_the_digest_of_these_very_facts(cache, monkeypatch):
    """Word for word: with any other key, or another order, a cache of today would be encoded again tomorrow."""
    sample = Sample("set", "a.png", "d" * 64, 100, 80, ("a",), Crop(88, 104, 4, 6, 80, 96))
    facts = {
        "schema": 1,
        "transform": 1,
        "vae": "fingerprint",
        "picture": "d" * 64,
        "crop": {"intermediate_height": 88, "intermediate_width": 104, "top": 4, "left": 6, "height": 80, "width": 96},
    }
    assert cache.key(sample) == sha256_of(facts)
    assert cache.key(sample.mirrored()) == sha256_of({**facts, "is_flipped": True})
    prompts = PromptCache(cache.store, cache.family, "encoders")
    facts = {"schema": 1, "encoders": "encoders", "prompt": "a dog"}
    assert prompts.key(PromptRequest("a dog")) == sha256_of(facts)
    images = (PromptImage(8, 16, "x"), PromptImage(8, 8, "y"))
    assert prompts.key(PromptRequest("a dog", images)) == sha256_of({**facts, "images": ["x", "y"]})
    monkeypatch.setattr(encoded, "__version__", "1.2.3")
    whole = ["1.2.3", {"schema": 1, "transform": 1, "vae": "fingerprint"}, "set", ["a"]]
    assert cache.set_fingerprint("set", ["a"]) == hashlib.sha256(json.dumps(whole).encode()).hexdigest()


def test_the_fingerprint_of_a_vae_is_the_digest_of_weights_settings_and_arithmetic(monkeypatch):
    config = {"_class_name": "AutoencoderKL", "_diffusers_version": "0.36", "_name_or_path": "x", "layers": 2}
    config |= {"scaling_factor": 0.13, "shift_factor": 0.1, "latents_mean": [0.0], "latents_std": [1.0]}
    monkeypatch.setattr(fingerprints, "component_config", lambda source, part: config)
    monkeypatch.setattr(fingerprints, "weight_files", lambda source, part: [part.role + ".a", part.role + ".b"])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    memo = SimpleNamespace(digest=lambda path: f"digest of {path}")
    facts = {
        "weights": ["digest of vae.a", "digest of vae.b"],
        "config": {"_class_name": "AutoencoderKL", "layers": 2},
        "dtype": "torch.bfloat16",
        "device": "cpu",
        "threads": 3,
    }
    found = vae_fingerprint(None, SPEC, memo, CPU, torch.bfloat16)
    assert found == sha256_of(facts)
    found = vae_fingerprint(None, SPEC, memo, torch.device("cuda"), torch.bfloat16, ("tiling",))
    assert found == sha256_of({**facts, "device": "cuda", "threads": None, "modes": ["tiling"]})
