"""diffusers' own pipelines around live weights, for families whose prompts are cached.

The pipeline gets embeddings from `family.prompts` in place of texts, so that no encoder is in memory while images are
generated, and hands latents back, which the family decodes: the same decoding for validation, previews and `generate`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import repeat
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL import Image

    from simpletuner.models.family import ModelFamily


class LivePipeline:
    """What `ModelFamily.pipeline` returns; a family whose pipeline has arguments of its own makes a subclass.

    Args:
        pipeline: diffusers' pipeline, without encoders and VAE.
        vae: None where only latents are asked for.
    """

    def __init__(self, family: ModelFamily, pipeline: Any, vae: nn.Module | None):
        self.family = family
        self.pipeline = pipeline
        self.vae = vae
        pipeline.set_progress_bar_config(disable=True)

    @classmethod
    def of(
        cls, family: ModelFamily, pipeline_class: Any, denoiser: nn.Module, vae: nn.Module | None, **options: Any
    ) -> Self:
        """Around `pipeline_class` with the denoiser and the model's scheduler, and None for its other parts.

        Args:
            options: further arguments of the class.
        """
        arguments = inspect.signature(pipeline_class).parameters.values()
        parts = dict.fromkeys(each.name for each in arguments if each.default is each.empty)
        parts |= {family.spec.component("denoiser").name: denoiser, "scheduler": family.make_scheduler()}
        return cls(family, pipeline_class(**{**parts, **options}), vae)

    @property
    def scheduler(self) -> Any:
        return self.pipeline.scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.pipeline.scheduler = scheduler

    def prompt_arguments(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None, guidance_scale: float
    ) -> dict[str, Any]:
        """What diffusers' pipeline is called with for these prompts: embeddings and guidance, no texts.

        By default the family's names of its embeddings, and the same with `negative_` in front.

        Args:
            negative_prompts: None leads away from the family's dropped caption, an empty text from what the encoders
                say of it.
        """
        family = self.family
        arguments: dict[str, Any] = {"guidance_scale": guidance_scale}
        negatives = [family.spec.negative_text(text) for text in negative_prompts or repeat(None, len(prompts))]
        for prefix, texts in (("", prompts), ("negative_", negatives)):
            rows = [row.tensors for row in family.prompts.embeds(texts)]
            for name in rows[0]:
                stacked = torch.stack([row[name] for row in rows])
                dtype = family.dtype if stacked.is_floating_point() else None  # masks stay as they are
                arguments[prefix + name] = stacked.to(family.device, dtype)
        return arguments

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
        """Generate one image per prompt.

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
        generated = self.pipeline(
            **self.prompt_arguments(prompts, negatives, guidance_scale),
            height=height,
            width=width,
            latents=None if latents is None else self.pack(latents.to(self.family.device, self.family.dtype)),
            output_type="latent",
            **options,
        ).images
        generated = self.family.unpack_latents(generated, height, width)
        if output_type == "latent":
            return ImagePipelineOutput(images=generated)  # type: ignore[arg-type]  # as diffusers' own do
        pixels = self.family.decode_latents(self.vae, generated.float())
        return ImagePipelineOutput(images=VaeImageProcessor().postprocess(pixels, output_type=output_type))

    def encode_reference(self, image: Image.Image, max_area: int) -> Tensor:
        """(C, h, w) scaled latents of an input image: the mean of what the VAE says, without its noise.

        Args:
            max_area: pixels; a larger image is reduced, and all are cut to the family's multiple from the middle.
        """
        from diffusers.image_processor import VaeImageProcessor

        from simpletuner.models.family import LatentMoments

        if self.vae is None:
            raise ValueError("this pipeline has no VAE, so it can take no references")
        processor = VaeImageProcessor()
        fitted = processor.pil_to_numpy(fit_image(image, max_area, self.family.spec.size_multiple))
        with torch.autocast(self.family.device.type, enabled=False):
            [moments] = self.family.encode_images(self.vae, processor.numpy_to_pt(fitted) * 2 - 1)
        mean = LatentMoments(moments.mean)
        return self.family.latents_from_moments(mean, torch.Generator(), self.family.vae_config)

    def save_pretrained(self, folder: Any, **options: Any) -> None:
        """Write the whole model in diffusers' layout, encoders and VAE included."""
        self.pipeline.register_modules(vae=self.vae, **self.family.encoders.everything())
        self.pipeline.save_pretrained(folder, **options)
        self.family.free_prompt_encoders()


class MaskedLivePipeline(LivePipeline):
    """For pipelines that take prompts of different length padded, with `prompt_attention_mask`."""

    def prompt_arguments(
        self, prompts: Sequence[str], negative_prompts: Sequence[str] | None, guidance_scale: float
    ) -> dict[str, Any]:
        """Prompts and negative prompts are padded together, since such pipelines join them to one batch."""
        family = self.family
        negatives = [family.spec.negative_text(text) for text in negative_prompts or repeat(None, len(prompts))]
        padded = family.condition_on(family.prompts.embeds([*prompts, *negatives]), ())
        embeds = padded["prompt_embeds"]
        mask = padded.tensors.get("prompt_mask", embeds.new_ones(embeds.shape[:2], dtype=torch.bool))
        arguments: dict[str, Any] = {"guidance_scale": guidance_scale, "negative_prompt": None}
        for prefix, rows in (("", slice(len(prompts))), ("negative_", slice(len(prompts), None))):
            arguments |= {f"{prefix}prompt_embeds": embeds[rows], f"{prefix}prompt_attention_mask": mask[rows]}
        return arguments


def fit_image(image: Image.Image, max_area: int, multiple: int) -> Image.Image:
    """An image of at most `max_area` pixels whose sides are multiples of `multiple`, cut from its middle."""
    from PIL import Image

    image = image.convert("RGB")
    scale = min(1.0, (max_area / (image.width * image.height)) ** 0.5)
    scale = max(scale, multiple / min(image.size))
    if scale != 1:
        width, height = (max(multiple, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    width, height = (side // multiple * multiple for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
