"""diffusers' own pipelines around live weights, for families whose prompts are cached.

The pipeline gets embeddings from `family.prompts` in place of texts, so that no encoder is in memory while pictures are
drawn, and hands latents back, which the family decodes: the same decoding for validation, previews and `generate`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from simpletuner.models.family import ModelFamily


class LivePipeline(ABC):
    """What `ModelFamily.pipeline` returns; each family says how its pipeline is called.

    Args:
        pipeline: diffusers' pipeline, without encoders and VAE.
        vae: None where only latents are asked for.
    """

    def __init__(self, family: ModelFamily, pipeline: Any, vae: nn.Module | None):
        self.family = family
        self.pipeline = pipeline
        self.vae = vae
        pipeline.set_progress_bar_config(disable=True)

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.pipeline.scheduler = scheduler

    @abstractmethod
    def prompt_arguments(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None, guidance_scale: float
    ) -> dict[str, Any]:
        """What diffusers' pipeline is called with for these prompts: embeddings and guidance, no texts.

        Args:
            negative_prompts: None leaves the choice to the family.
        """

    def pack(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) -> latents as the pipeline has them; the family's `unpack_latents` is the inverse."""
        return latents

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        height: int,
        width: int,
        guidance_scale: float = 5.0,
        latents: Tensor | None = None,
        output_type: str = "pil",
        **options: Any,
    ) -> Any:
        """Draw one picture per prompt.

        Args:
            height: pixels.
            width: pixels.
            latents: (B, C, h, w) the noise to begin with.
            output_type: `pil`, `np`, `pt`, or `latent` for scaled latents (B, C, h, w).
            options: passed on (`num_inference_steps`, `generator`, `callback_on_step_end`).
        """
        from diffusers.image_processor import VaeImageProcessor
        from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

        if self.vae is None and output_type != "latent":
            raise ValueError(f'this pipeline has no VAE, so output_type must be "latent", not "{output_type}"')
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        negatives = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        drawn = self.pipeline(
            **self.prompt_arguments(prompts, negatives, guidance_scale),
            height=height,
            width=width,
            latents=None if latents is None else self.pack(latents.to(self.family.device, self.family.dtype)),
            output_type="latent",
            **options,
        ).images
        drawn = self.family.unpack_latents(drawn, height, width)
        if output_type == "latent":
            return ImagePipelineOutput(images=drawn)
        pixels = self.family.decode_latents(self.vae, drawn.float())
        return ImagePipelineOutput(images=VaeImageProcessor().postprocess(pixels, output_type=output_type))

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        """Write the whole model in diffusers' layout, encoders and VAE included."""
        self.pipeline.register_modules(vae=self.vae, **self.family.encoders.everything())
        self.pipeline.save_pretrained(folder, **options)
        self.family.free_prompt_encoders()
