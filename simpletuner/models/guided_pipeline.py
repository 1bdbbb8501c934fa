"""Generating with a second prediction that guidance leads away from: a call of the contract, and what families vary.

For families whose public pipeline cannot be used around live weights: it wants its encoders or its VAE, or takes one
set of references for a whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor, nn

from simpletuner.batch import Conditioning, PromptImage
from simpletuner.models.flow_pipeline import Callback, FlowPipeline, Generators
from simpletuner.models.live_pipeline import fit_image

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily

# A reference is reduced to so many pixels and never enlarged.
MAX_REFERENCE_PIXELS = 1024 * 1024


class GuidedFlowPipeline(FlowPipeline):
    """Text, and references, to image around live weights; a family overrides what is its own."""

    def __init__(self, family: ModelFamily, transformer: nn.Module, vae: nn.Module | None):
        super().__init__(family, transformer, vae, FlowMatchEulerDiscreteScheduler.from_config(family.scheduler_config))

    def sampling_mu(self, num_patches: int, num_steps: int) -> float:
        """The logarithm of the shift of sampling; the scheduler ignores it where its own shift is fixed."""
        return math.log(self.family.training_shift(num_patches))

    def first_sigmas(self, num_steps: int) -> Sequence[float]:
        """The noise levels before each step, before they are shifted."""
        return torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist()

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether a second prediction, for the negative prompt, is made."""
        return guidance_scale > 1

    def guided(self, positive: Tensor, negative: Tensor, guidance_scale: float) -> Tensor:
        """What the predictions for prompt and negative prompt make together."""
        return negative + guidance_scale * (positive - negative)

    def fit_reference(self, image: Image.Image) -> Image.Image:
        """A reference at the size that the VAE sees."""
        return fit_image(image, MAX_REFERENCE_PIXELS, self.family.spec.size_multiple)

    def condition(
        self,
        prompts: Sequence[str],
        images: Sequence[Sequence[PromptImage]] | None,
        references: Sequence[Sequence[Tensor]],
        guidance_scale: float,
    ) -> Conditioning:
        """The conditioning of prompts and references.

        Args:
            images: the references as encoders see them; None for encoders that see none.
            references: their latents.
            guidance_scale: for networks that take it as an input.
        """
        return self.family.condition_on(self.family.prompts.embeds(prompts, images), references)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int,
        width: int,
        num_inference_steps: int = 28,
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
            height: pixels, a multiple of the family's `size_multiple`.
            width: like `height`.
            guidance_scale: in the family's own convention.
            generator: one for all images, or one per image.
            latents: (B, C, h, w) the noise to begin with.
            callback_on_step_end: see `FlowPipeline.denoise`.
            output_type: `pil`, `np`, `pt`, or `latent` for scaled latents.
            references: per prompt its reference images, of any size.

        Raises:
            ValueError: a size that does not fit, or no VAE where one is needed.
        """
        self.require_vae(output_type, references)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        latents = self.first_latents(len(prompts), height, width, generator, latents)
        rows = references or [()] * len(prompts)
        seen = [[self.encode_fitted(self.fit_reference(each)) for each in row] for row in rows]
        images = None
        if self.family.spec.prompts_see_references:
            images = [[self.family.prompt_image(each) for each in row] for row in rows]
        conditionings = [self.condition(prompts, images, seen, guidance_scale)]
        if self.is_guided(guidance_scale):
            texts = [self.family.spec.negative_text(text) for text in negatives or repeat(None, len(prompts))]
            conditionings.append(self.condition(texts, images, seen, guidance_scale))

        def predict(latents: Tensor, sigmas: Tensor, step: int) -> Tensor:
            positive, *negative = (
                self.family.predict(self.transformer, latents, sigmas, each).float() for each in conditionings
            )
            return self.guided(positive, negative[0], guidance_scale) if negative else positive

        sigmas = self.set_sigmas(num_inference_steps, latents)
        return self.output(self.denoise(latents, sigmas, predict, callback_on_step_end), output_type)

    def set_sigmas(self, num_steps: int, latents: Tensor) -> list[float]:
        """The noise levels before each step, shifted; the scheduler steps along them."""
        num_patches = latents.shape[-2] * latents.shape[-1] // self.family.spec.patch_size**2
        mu = self.sampling_mu(num_patches, num_steps)
        # Of one step the first level is the last one: there is nothing to stretch.
        terminal = None if num_steps == 1 else self.family.scheduler_config.get("shift_terminal")
        self.scheduler.register_to_config(shift_terminal=terminal)
        self.scheduler.set_timesteps(sigmas=list(self.first_sigmas(num_steps)), device=latents.device, mu=mu)
        self.scheduler.set_begin_index(0)
        return (self.scheduler.timesteps / self.scheduler.config.num_train_timesteps).tolist()
