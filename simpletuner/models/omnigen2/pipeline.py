"""Generating with OmniGen2: guidance towards the instruction and towards the reference images, each with its strength.

Source: VectorSpaceLab/OmniGen2 (Apache-2.0), `omnigen2/pipelines/omnigen2/pipeline_omnigen2.py` and its schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import Tensor, nn

from simpletuner.batch import Conditioning
from simpletuner.diffusion.timesteps import shifted_sigmas
from simpletuner.models.components import save_model_folder
from simpletuner.models.family import LatentMoments

if TYPE_CHECKING:
    from simpletuner.models.omnigen2.family import OmniGen2

# A reference image is reduced to so many pixels and to this longer side, and never enlarged.
MAX_REFERENCE_PIXELS = 1024 * 1024
MAX_REFERENCE_SIDE = 1024
PIXELS_PER_TOKEN = 16
IMAGE_GUIDANCE = 2.0

Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, Any, dict[str, Tensor]], dict[str, Tensor]]


class OmniGen2Pipeline:
    """Text, and reference images, to image around live weights.

    Args:
        family: encodes prompts, predicts, and knows device and dtype.
        transformer: the denoiser, adapters and wrappers included.
        vae: for references and for pixels; None where only latents are asked for.

    Attributes:
        scheduler: Euler's steps; a `DPMSolverMultistepScheduler` in its place is used on the same noise levels.
    """

    def __init__(self, family: OmniGen2, transformer: nn.Module, vae: nn.Module | None):
        self.family = family
        self.transformer = transformer
        self.vae: Any = vae
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler()  # its own shift of 1 is none

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int,
        width: int,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        img_guidance_scale: float = IMAGE_GUIDANCE,
        cfg_range: tuple[float, float] = (0.0, 1.0),
        generator: Generators = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        output_type: str = "pil",
        references: Sequence[Sequence[Image.Image]] | None = None,
    ) -> ImagePipelineOutput:
        """Generate one image per prompt.

        Args:
            negative_prompt: one for all or one per prompt; None leads away from a dropped instruction.
            height: pixels, a multiple of 16.
            width: like `height`.
            guidance_scale: how far guidance leads towards the instruction; up to 1 there is none of either kind.
            img_guidance_scale: how far it leads towards the references, for prompts that have any; up to 1 not at all.
            cfg_range: shares of the sampling steps between which there is guidance, both included.
            generator: one for all images, or one per image.
            latents: (B, 16, h, w) the noise to begin with.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": latents}); what it returns under
                `latents` is used from there on.
            output_type: `pil`, `np`, `pt`, or `latent` for scaled latents.
            references: per prompt its reference images.

        Raises:
            ValueError: a size that is no multiple of 16, or no VAE where one is needed.
        """
        if self.vae is None and (output_type != "latent" or any(references or ())):
            what = "take no references" if output_type == "latent" else f'not give "{output_type}", only "latent"'
            raise ValueError(f"this pipeline has no VAE, so it can {what}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        latents = self._first_latents(len(prompts), height, width, generator, latents)
        seen = [[self.encode_reference(each) for each in row] for row in references or [()] * len(prompts)]
        rows = self._conditions(prompts, negatives or [None] * len(prompts), seen)
        sigmas = self._set_sigmas(num_inference_steps, latents)
        for step, (sigma, timestep) in enumerate(zip(sigmas, self.scheduler.timesteps, strict=True)):
            is_guided = cfg_range[0] <= step / num_inference_steps <= cfg_range[1]
            scales = (guidance_scale, img_guidance_scale) if is_guided else (1.0, 1.0)
            prediction = self._guided(latents, sigma, rows, *scales)
            latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, step, timestep, {"latents": latents}).pop("latents", latents)
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)  # type: ignore[arg-type]  # as diffusers' own do
        pixels = self.family.decode_latents(self.vae, latents)
        return ImagePipelineOutput(images=VaeImageProcessor().postprocess(pixels, output_type=output_type))

    def encode_reference(self, image: Image.Image) -> Tensor:
        """(C, h, w) scaled latents of a reference image: the mean of what the VAE says, without its noise."""
        processor = VaeImageProcessor()
        pixel_values = processor.numpy_to_pt(processor.pil_to_numpy(fit_reference(image))) * 2 - 1
        with torch.autocast(self.family.device.type, enabled=False):
            [moments] = self.family.encode_images(self.vae, pixel_values)
        return self.family.latents_from_moments(LatentMoments(moments.mean), torch.Generator(), self.vae.config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the whole model in the released layout, encoder and VAE included."""
        family = self.family
        save_model_folder(family.source, family.spec, self.transformer, family.scheduler_config, Path(folder))

    def _first_latents(
        self, count: int, height: int, width: int, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        spec, device = self.family.spec, self.family.device
        if height % spec.size_multiple or width % spec.size_multiple:
            raise ValueError(f"height and width must be multiples of {spec.size_multiple}, not {height} and {width}")
        if latents is not None:
            return latents.to(device, torch.float32)
        shape = (count, spec.latent_channels, height // spec.vae_factor, width // spec.vae_factor)
        return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)

    def _conditions(
        self, prompts: Sequence[str], negatives: Sequence[str | None], references: Sequence[Sequence[Tensor]]
    ) -> list[Conditioning]:
        """What guidance compares: everything that was asked for, nothing of it, and the references alone."""
        family = self.family
        asked = family.prompts.embeds(prompts)
        negative = family.prompts.embeds([family.spec.negative_text(text) for text in negatives])
        pairs = [(asked, references), (negative, ()), *([(negative, references)] if any(references) else [])]
        return [family.condition_on(embeds, seen) for embeds, seen in pairs]

    def _guided(
        self, latents: Tensor, sigma: float, rows: Sequence[Conditioning], text_scale: float, image_scale: float
    ) -> Tensor:
        """(B, C, h, w) float32 from the predictions for `_conditions`."""
        sigmas = torch.full((len(latents),), sigma, device=latents.device)

        def predict(row: Conditioning) -> Tensor:
            return self.family.predict(self.transformer, latents, sigmas, row).float()

        asked = predict(rows[0])
        if text_scale <= 1:
            return asked
        nothing = predict(rows[1])
        if len(rows) == 2 or image_scale <= 1:
            return nothing + text_scale * (asked - nothing)
        images = predict(rows[2])
        return nothing + image_scale * (images - nothing) + text_scale * (asked - images)

    def _set_sigmas(self, num_steps: int, latents: Tensor) -> list[float]:
        """The noise levels before each step, shifted with the size of the image; the scheduler steps along them."""
        is_shifted = self.family.scheduler_config.get("dynamic_time_shift", True)
        shift = math.sqrt(latents.shape[-2] * latents.shape[-1]) / 40 if is_shifted else 1.0
        sigmas = shifted_sigmas(torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64), shift).float()
        if not isinstance(self.scheduler, DPMSolverMultistepScheduler):
            self.scheduler.set_timesteps(sigmas=sigmas.numpy(), device=latents.device)
            return sigmas.tolist()
        # Its own flow schedule has other levels, so these are put in their place.
        self.scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        self.scheduler.set_timesteps(num_steps)
        self.scheduler.sigmas = torch.cat([sigmas, torch.zeros(1)])
        self.scheduler.timesteps = sigmas * self.scheduler.config.num_train_timesteps
        self.scheduler.set_begin_index(0)
        return sigmas.tolist()


def fit_reference(image: Image.Image) -> Image.Image:
    """A reference image upright, reduced to the limits, its sides stretched down to whole tokens."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    area = image.width * image.height
    ratio = min(math.sqrt(MAX_REFERENCE_PIXELS / area), MAX_REFERENCE_SIDE / max(image.size), 1.0)
    width, height = (max(1, int(side * ratio) // PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN for side in image.size)
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)
