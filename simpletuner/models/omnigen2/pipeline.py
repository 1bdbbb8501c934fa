"""Generating with OmniGen2: guidance toward the instruction and toward the reference images, each with its strength.

Source: VectorSpaceLab/OmniGen2 (Apache-2.0), `omnigen2/pipelines/omnigen2/pipeline_omnigen2.py` and its schedulers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image, ImageOps
from torch import Tensor

from simpletuner.batch import Conditioning
from simpletuner.diffusion.timesteps import shifted_sigmas
from simpletuner.models.flow_pipeline import Callback, FlowPipeline, Generators

# A reference image is reduced to so many pixels and to this longer side, and never enlarged.
MAX_REFERENCE_PIXELS = 1024 * 1024
MAX_REFERENCE_SIDE = 1024
PIXELS_PER_TOKEN = 16
IMAGE_GUIDANCE = 2.0


class OmniGen2Pipeline(FlowPipeline):
    """Text, and reference images, to image around live weights.

    Attributes:
        scheduler: Euler's steps; a `DPMSolverMultistepScheduler` in its place is used on the same noise levels.
    """

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
            guidance_scale: how far guidance leads toward the instruction; up to 1 there is none of either kind.
            img_guidance_scale: how far it leads toward the references, for prompts that have any; up to 1 not at all.
            cfg_range: shares of the sampling steps between which there is guidance, both included.
            generator: one for all images, or one per image.
            latents: (B, 16, h, w) the noise to begin with.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": latents}); what it returns under
                `latents` is used from there on.
            output_type: `pil`, `np`, `pt`, or `latent` for scaled latents.
            references: per prompt its reference images.

        Raises:
            ValueError: a size that is not a multiple of 16, or no VAE where one is needed.
        """
        self.require_vae(output_type, references)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        latents = self.first_latents(len(prompts), height, width, generator, latents)
        seen = [[self.encode_reference(each) for each in row] for row in references or [()] * len(prompts)]
        rows = self._conditions(prompts, negatives or [None] * len(prompts), seen)

        def predict(latents: Tensor, sigmas: Tensor, step: int) -> Tensor:
            is_guided = cfg_range[0] <= step / num_inference_steps <= cfg_range[1]
            return self._guided(
                latents, sigmas, rows, *((guidance_scale, img_guidance_scale) if is_guided else (1.0, 1.0))
            )

        sigmas = self._set_sigmas(num_inference_steps, latents)
        return self.output(self.denoise(latents, sigmas, predict, callback_on_step_end), output_type)

    def encode_reference(self, image: Image.Image) -> Tensor:
        """(C, h, w) scaled latents of a reference image of any size."""
        return self.encode_fitted(fit_reference(image))

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
        self, latents: Tensor, sigmas: Tensor, rows: Sequence[Conditioning], text_scale: float, image_scale: float
    ) -> Tensor:
        """(B, C, h, w) float32 from the predictions for `_conditions`."""

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
