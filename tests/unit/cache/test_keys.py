"""What tells latents apart, and what is kept of them."""

from __future__ import annotations

import pytest
import torch

from simpletuner.cache import encoding, latents
from simpletuner.cache.encoding import BatchEncoder
from simpletuner.cache.fingerprints import vae_fingerprint
from simpletuner.cache.latents import LatentCache, OnDemandLatents
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
