"""Latents scaled by what the VAE's configuration says: one number for all channels, or one for each."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from safetensors.torch import load_file

from simpletuner.families.registry import get_family_class, get_spec
from simpletuner.models.components import ModelSource
from simpletuner.models.family import LatentMoments, ModelFamily
from simpletuner.models.vae_config import latent_statistics
from tests.tiny import GOLDEN

QWEN_IMAGE = GOLDEN / "qwen_image"


@pytest.fixture
def family() -> ModelFamily:
    spec = get_spec("sd3")
    return get_family_class(spec)(spec, ModelSource("unused"), torch.device("cpu"), torch.float32)


def test_each_channel_has_its_own_mean_and_deviation(family: ModelFamily):
    raw = torch.tensor([3.0, 5.0]).view(2, 1, 1).expand(2, 4, 6)
    config = {"latents_mean": [1.0, -3.0], "latents_std": [4.0, 2.0]}
    latents = family.latents_from_moments(LatentMoments(raw), torch.Generator(), config)
    assert latents.shape == (2, 4, 6)
    assert latents[:, 0, 0].tolist() == [0.5, 4.0]
    assert latents[:, 3, 5].tolist() == [0.5, 4.0]


def test_a_scaling_factor_beside_a_deviation_counts_too():
    """diffusers' `pipeline_stable_diffusion_xl.py` decodes `latents * std / scaling_factor + mean`."""
    config = {"latents_mean": [1.0, 0.0], "latents_std": [4.0, 2.0], "scaling_factor": 0.5}
    mean, scale = latent_statistics(config)
    assert mean.flatten().tolist() == [1.0, 0.0]
    assert scale.flatten().tolist() == [0.125, 0.25]


@pytest.mark.parametrize("shift", [{}, {"shift_factor": None}, {"latents_mean": None, "latents_std": None}])
def test_statistics_that_are_null_are_as_if_they_were_not_there(shift: dict[str, None]):
    assert latent_statistics({"scaling_factor": 0.25, **shift}) == (0.0, 0.25)


def test_a_vae_of_videos_gives_the_moments_the_latents_and_the_image_of_the_golden_case(family: ModelFamily):
    vae = AutoencoderKLQwenImage.from_config(AutoencoderKLQwenImage.load_config(QWEN_IMAGE / "vae_config.json")).eval()
    vae.load_state_dict(load_file(QWEN_IMAGE / "vae_weights.safetensors"))
    golden = load_file(QWEN_IMAGE / "vae_case.safetensors")
    [moments] = family.encode_images(vae, golden["pixels"])
    torch.testing.assert_close(moments.mean, golden["posterior_mean"][0], rtol=0, atol=1e-6)
    assert moments.std is not None
    torch.testing.assert_close(moments.std, golden["posterior_std"][0], rtol=0, atol=1e-6)
    latents = family.latents_from_moments(LatentMoments(moments.mean), torch.Generator(), vae.config)
    torch.testing.assert_close(latents, golden["latents"][0], rtol=0, atol=1e-6)
    decoded = family.decode_latents(vae, latents[None])
    torch.testing.assert_close(decoded, golden["decoded"], rtol=0, atol=1e-5)
