"""What a pipeline gives the VAE, and what comes back, with VAEs that can be worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from simpletuner.models.family import LatentMoments, ModelFamily
from simpletuner.models.live_pipeline import LivePipeline


def test_a_reference_is_encoded_from_minus_one_to_one_and_without_the_noise_of_the_vae() -> None:
    seen: list[Tensor] = []

    def encode_images(vae: Any, pixels: Tensor) -> list[LatentMoments]:
        seen.append(pixels)
        assert not torch.is_autocast_enabled("cpu")
        return [LatentMoments(pixels[0], torch.full_like(pixels[0], 9.0))]

    family: Any = SimpleNamespace(
        spec=SimpleNamespace(size_multiple=1),
        device=torch.device("cpu"),
        vae_config={"latent_channels": 3, "scaling_factor": 2.0, "shift_factor": 0.25},
        encode_images=encode_images,
        latents_from_moments=lambda *given: ModelFamily.latents_from_moments(family, *given),
    )
    image = Image.new("RGB", (2, 1))
    image.putdata([(0, 51, 255), (255, 204, 0)])
    live = LivePipeline(family, SimpleNamespace(set_progress_bar_config=lambda disable: None), nn.Identity())
    with torch.autocast("cpu"):
        latents = live.encode_reference(image, 64)
    pixels = torch.tensor([[[-1.0, 1.0]], [[-0.6, 0.6]], [[1.0, -1.0]]])
    torch.testing.assert_close(seen, [pixels[None]])
    torch.testing.assert_close(latents, 2 * (pixels - 0.25))


class HalfVae(nn.Module):
    """A VAE in bfloat16 that answers with the pixels themselves."""

    def __init__(self, is_deterministic: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        self.config: dict[str, Any] = {}
        self.is_deterministic = is_deterministic

    def encode(self, pixels: Tensor) -> Any:
        if self.is_deterministic:
            return SimpleNamespace(latent=pixels)
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixels, std=pixels / 2))


@pytest.mark.parametrize("is_deterministic", [False, True])
def test_moments_are_float32_whatever_the_vae_computes_in(is_deterministic: bool) -> None:
    pixels = torch.tensor([-0.5, 0.25]).reshape(2, 1, 1, 1).expand(2, 3, 1, 1)
    found = ModelFamily.encode_images(cast(Any, None), HalfVae(is_deterministic), pixels)
    for moments, value in zip(found, (-0.5, 0.25), strict=True):
        assert torch.equal(moments.mean, torch.full((3, 1, 1), value))
        assert moments.mean.dtype == torch.float32
        if is_deterministic:
            assert moments.std is None
        else:
            assert moments.std is not None
            assert (moments.std.dtype, moments.std.flatten().tolist()) == (torch.float32, [value / 2] * 3)
