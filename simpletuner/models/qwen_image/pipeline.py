"""Generating with Qwen-Image and Qwen-Image-Edit: guidance whose strength does not change the size of the prediction.

Source: QwenLM/Qwen-Image; diffusers' `pipeline_qwenimage.py` and `pipeline_qwenimage_edit_plus.py`, which cannot take
embeddings and references on live weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptImage
from simpletuner.diffusion.timesteps import scheduler_shift
from simpletuner.models.flow_pipeline import Callback, FlowPipeline, Generators
from simpletuner.models.live_pipeline import fit_image
from simpletuner.models.patches import pack, unpack

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily, PromptReferences

# A reference image is reduced to so many pixels, and never enlarged.
MAX_REFERENCE_PIXELS = 1024 * 1024


class QwenImagePipeline(FlowPipeline):
    """Text, and reference images where the family has them, to image around live weights."""

    pack = staticmethod(pack)

    def __init__(self, family: ModelFamily, transformer: nn.Module, vae: nn.Module | None):
        super().__init__(family, transformer, vae, FlowMatchEulerDiscreteScheduler.from_config(family.scheduler_config))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int,
        width: int,
        num_inference_steps: int = 50,
        guidance_scale: float = 4.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callback | None = None,
        output_type: str = "pil",
        references: Sequence[Sequence[Image.Image]] | None = None,
    ) -> ImagePipelineOutput:
        """Generate one image per prompt.

        Args:
            negative_prompt: one for all or one per prompt; None leads away from a dropped caption.
            height: pixels, a multiple of 16.
            width: like `height`.
            guidance_scale: diffusers' `true_cfg_scale`; up to 1 there is none.
            generator: one for all images, or one per image.
            latents: (B, 16, h, w) the noise to begin with.
            callback_on_step_end: see `FlowPipeline.denoise`.
            output_type: `pil`, `np`, `pt`, or `latent` for scaled latents.
            references: per prompt its reference images, of any size.

        Raises:
            ValueError: a size that is no multiple of 16, or no VAE where one is needed.
        """
        self.require_vae(output_type, references)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        rows = references or [()] * len(prompts)
        images = [[PromptImage.of(each) for each in row] for row in rows]
        seen = [[self.encode_reference(each) for each in row] for row in rows]
        latents = self.first_latents(len(prompts), height, width, generator, latents)
        wanted = self.condition(prompts, images, seen)
        unwanted = None
        if guidance_scale > 1:
            texts = [self.family.spec.negative_text(text) for text in negatives or [None] * len(prompts)]
            unwanted = self.condition(texts, images, seen)

        def predict(latents: Tensor, sigmas: Tensor, step: int) -> Tensor:
            prediction = self.family.predict(self.transformer, latents, sigmas, wanted).float()
            if unwanted is None:
                return prediction
            negative = self.family.predict(self.transformer, latents, sigmas, unwanted).float()
            return guided(prediction, negative, guidance_scale)

        sigmas = self.set_sigmas(num_inference_steps, latents)
        return self.output(self.denoise(latents, sigmas, predict, callback_on_step_end), output_type)

    def encode_reference(self, image: Image.Image) -> Tensor:
        """(C, h, w) scaled latents of a reference image of any size."""
        return self.encode_fitted(fit_image(image, MAX_REFERENCE_PIXELS, self.family.spec.size_multiple))

    def condition(
        self, prompts: Sequence[str], images: PromptReferences, latents: Sequence[Sequence[Tensor]]
    ) -> Conditioning:
        """What the denoiser is told: embeddings of the prompts, and the latents of their references."""
        return self.family.condition_on(self.family.prompts.embeds(prompts, images), latents)

    def set_sigmas(self, num_steps: int, latents: Tensor) -> list[float]:
        """The noise levels before each step: shifted with the size of the image, then stretched to the last one."""
        config = self.family.scheduler_config
        num_patches = latents.shape[-2] * latents.shape[-1] // self.family.spec.patch_size**2
        options = {"mu": math.log(scheduler_shift(config, num_patches))} if config.get("use_dynamic_shifting") else {}
        if num_steps == 1:  # the first level is the last one: there is nothing to stretch
            self.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift_terminal=None)
        levels = np.linspace(1.0, 1 / num_steps, num_steps)
        self.scheduler.set_timesteps(sigmas=levels, device=latents.device, **options)
        return (self.scheduler.timesteps / config.get("num_train_timesteps", 1000)).tolist()


def guided(prediction: Tensor, negative: Tensor, scale: float) -> Tensor:
    """(B, C, h, w) away from `negative`, each patch as long as that of `prediction`."""
    height, width = prediction.shape[-2:]
    wanted, unwanted = pack(prediction), pack(negative)
    combined = unwanted + scale * (wanted - unwanted)
    combined *= wanted.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
    return unpack(combined, height, width)
