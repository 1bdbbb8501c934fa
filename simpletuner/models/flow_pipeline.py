"""What the pipelines of this package share: the noise, the scheduler's steps, the pixels.

A family has such a pipeline where those of diffusers cannot take cached embeddings together with reference images, or
lack its guidance; all others use `live_pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from simpletuner.models.components import save_model_folder
from simpletuner.models.family import LatentMoments

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily

Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]]


class FlowPipeline:
    """Generates along a flow; a subclass says what the denoiser is asked, and along which noise levels.

    Args:
        family: encodes prompts, predicts, and knows device and dtype.
        transformer: the denoiser, adapters and wrappers included.
        vae: for references and for pixels; None where only latents are asked for.
        scheduler: steps along the noise levels that the subclass gives it.
    """

    def __init__(
        self, family: ModelFamily, transformer: nn.Module, vae: nn.Module | None, scheduler: Any | None = None
    ):
        self.family = family
        self.transformer = transformer
        self.vae: Any = vae
        self.scheduler: Any = scheduler or FlowMatchEulerDiscreteScheduler()  # its own shift of 1 is none

    def require_vae(self, output_type: str, references: Sequence[Sequence[Image.Image]] | None) -> None:
        """Raise ValueError where there is no VAE and one is needed."""
        if self.vae is None and (output_type != "latent" or any(references or ())):
            what = "take no references" if output_type == "latent" else f'not give "{output_type}", only "latent"'
            raise ValueError(f"this pipeline has no VAE, so it can {what}")

    def first_latents(
        self, count: int, height: int, width: int, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """(B, C, h, w) float32: the noise to begin with, `latents` where they are given.

        Raises:
            ValueError: a size that is not a multiple of the family's.
        """
        spec, device = self.family.spec, self.family.device
        if height % spec.size_multiple or width % spec.size_multiple:
            raise ValueError(f"height and width must be multiples of {spec.size_multiple}, not {height} and {width}")
        if latents is not None:
            return latents.to(device, torch.float32)
        shape = (count, spec.latent_channels, height // spec.vae_factor, width // spec.vae_factor)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def denoise(
        self,
        latents: Tensor,
        sigmas: Sequence[float],
        predict: Callable[[Tensor, Tensor, int], Tensor],
        callback: Callback | None,
    ) -> Tensor:
        """The data that the scheduler's steps lead to.

        Args:
            latents: (B, C, h, w) noise.
            sigmas: the noise level before each step.
            predict: called with latents, (B,) sigmas and the number of the step.
            callback: called as (pipeline, step, timestep, {"latents": latents}); what it returns under `latents` is
                used from there on.
        """
        for step, (sigma, timestep) in enumerate(zip(sigmas, self.scheduler.timesteps, strict=True)):
            prediction = predict(latents, torch.full((len(latents),), sigma, device=latents.device), step)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            if callback is not None:
                latents = callback(self, step, timestep, {"latents": latents}).pop("latents", latents)
        return latents

    def output(self, latents: Tensor, output_type: str) -> ImagePipelineOutput:
        """Scaled latents as `pil`, `np` or `pt`, or as they are (`latent`)."""
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)  # type: ignore[arg-type]  # as diffusers' own do
        pixels = self.family.decode_latents(self.vae, latents)
        return ImagePipelineOutput(images=VaeImageProcessor().postprocess(pixels, output_type=output_type))

    def encode_fitted(self, image: Image.Image) -> Tensor:
        """(C, h, w) scaled latents of an image of a fitting size: the mean of what the VAE says, without its noise."""
        processor = VaeImageProcessor()
        pixel_values = processor.numpy_to_pt(processor.pil_to_numpy(image)) * 2 - 1
        with torch.autocast(self.family.device.type, enabled=False):
            [moments] = self.family.encode_images(self.vae, pixel_values)
        return self.family.latents_from_moments(LatentMoments(moments.mean), torch.Generator(), self.family.vae_config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole model in the released layout, encoder and VAE included."""
        family = self.family
        save_model_folder(family.source, family.spec, self.transformer, family.scheduler_config, Path(folder))
