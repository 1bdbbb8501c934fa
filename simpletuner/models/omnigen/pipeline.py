"""Generating with OmniGen: diffusers' pipeline without torchvision, with a negative prompt, and with the text run once.

The class keeps diffusers' name, since a saved `model_index.json` carries the name of its class and must load there.
Source: diffusers' `pipelines/omnigen/pipeline_omnigen.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.omnigen.pipeline_omnigen import OmniGenPipeline as DiffusersOmniGenPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor, nn

from simpletuner.batch import PromptImage
from simpletuner.errors import DataError, Problem
from simpletuner.models.components import component_file
from simpletuner.models.family import LatentMoments, ModelFamily
from simpletuner.models.flow_pipeline import Generators
from simpletuner.models.omnigen.attention import TextCache
from simpletuner.models.omnigen.tokens import PIXELS_PER_TOKEN, collate_tokens, image_placeholders
from simpletuner.models.safe_loading import load_tokenizer, read_object

# What diffusers' processor uses for everybody (`processor_omnigen.py`), so that an image generated there is the same.
DEFAULT_NEGATIVE_PROMPT = (
    "low quality, jpeg artifacts, ugly, duplicate, morbid, mutilated, extra fingers, mutated hands, "
    "poorly drawn hands, poorly drawn face, mutation, deformed, blurry, dehydrated, bad anatomy, bad "
    "proportions, extra limbs, cloned face, disfigured, gross proportions, malformed limbs, missing arms, "
    "missing legs, extra arms, extra legs, fused fingers, too many fingers."
)
# diffusers' default (`max_input_image_size`).
MAX_REFERENCE_SIDE = 1024

PromptRow = tuple[str, list[Tensor]]  # a prompt and the latents of its input images


class OmniGenPipeline(DiffusersOmniGenPipeline):
    """Text, and input images, to image around live weights.

    Args:
        transformer: a denoiser from `OmniGen.load_denoiser`, adapters and wrappers included.
        scheduler: OmniGen's own, which counts from noise to data.
        vae: for `output_type="pil"`; None where only latents are asked for.
        tokenizer: None; `save_pretrained` loads the one of the model folder.
        family: turns prompts into token rows, and knows device and dtype.
    """

    def __init__(
        self,
        transformer: nn.Module,
        scheduler: FlowMatchEulerDiscreteScheduler,
        vae: nn.Module | None,
        tokenizer: Any,
        family: ModelFamily | None = None,
    ):
        assert family is not None, "family has a default only so that diffusers does not take it for a component"
        # Not diffusers' own __init__: it builds a processor from torchvision.
        DiffusionPipeline.__init__(self)
        self.register_modules(vae=vae, tokenizer=tokenizer, transformer=transformer, scheduler=scheduler)
        self.family = family
        self.vae_scale_factor = family.spec.vae_factor
        self.image_processor = VaeImageProcessor(vae_scale_factor=PIXELS_PER_TOKEN)
        self.default_sample_size = 128
        self.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.5,
        generator: Generators = None,
        latents: Tensor | None = None,
        callback_on_step_end: Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor]] | None = None,
        output_type: str = "pil",
        references: Sequence[Sequence[Image.Image]] | None = None,
        img_guidance_scale: float = 1.6,
    ) -> ImagePipelineOutput:
        """Generate one image per prompt.

        Args:
            negative_prompt: one for all or one per prompt; None is diffusers' default for OmniGen.
            height: pixels, a multiple of 16; 1024 where not given.
            width: like `height`.
            guidance_scale: 1 leaves the negative prompt out.
            generator: one for all images, or one per image.
            latents: (B, 4, h, w) the noise to begin with.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": latents}); what it returns under
                `latents` is used from there on.
            output_type: `pil`, `np`, `pt`, or `latent` for scaled latents.
            references: per prompt its input images.
            img_guidance_scale: how far guidance leads toward the input images, where there are any.
        """
        if self.vae is None and (output_type != "latent" or any(references or ())):
            what = "take no references" if output_type == "latent" else f'not give "{output_type}", only "latent"'
            raise ValueError(f"this pipeline has no VAE, so it can {what}")
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        height, width = self._check_size(height, width)
        self._guidance_scale = guidance_scale
        latents = self._initial_latents(len(prompts), height, width, generator, latents)
        images = [self._encode_references(row) for row in references or [()] * len(prompts)]
        negative = _negative_prompts(negative_prompt, len(prompts))
        rows = _guidance_rows(list(zip(prompts, images, strict=True)), negative, guidance_scale)
        scales = (guidance_scale, img_guidance_scale)
        num_image_tokens = height * width // PIXELS_PER_TOKEN**2
        with eval_mode(self.transformer):
            text = self._run_text(rows, num_image_tokens)
            latents = self._denoise(latents, text, len(rows), num_inference_steps, scales, callback_on_step_end)
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)  # type: ignore[arg-type]  # as diffusers' own do
        pixels = self.family.decode_latents(self.vae, latents)
        return ImagePipelineOutput(images=self.image_processor.postprocess(pixels, output_type=output_type))

    def _check_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        default = self.default_sample_size * self.vae_scale_factor
        height, width = height or default, width or default
        if height % PIXELS_PER_TOKEN or width % PIXELS_PER_TOKEN:
            raise ValueError(f"height and width must be multiples of {PIXELS_PER_TOKEN}, not {height} and {width}")
        return height, width

    def _initial_latents(
        self, num_images: int, height: int, width: int, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        if latents is not None:
            return latents.to(self.family.device, torch.float32)
        factor = self.vae_scale_factor
        shape = (num_images, self.family.spec.latent_channels, height // factor, width // factor)
        return randn_tensor(shape, generator=generator, device=self.family.device, dtype=torch.float32)

    def _encode_references(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Scaled latents (C, h, w) of input images: the mean of what the VAE says, without its noise."""
        latents = []
        for image in images:
            pixel_values = self.image_processor.pil_to_numpy(_fitted(image))
            pixel_values = self.image_processor.numpy_to_pt(pixel_values) * 2 - 1  # (1, 3, H, W)
            with torch.autocast(self.vae.device.type, enabled=False):
                [moments] = self.family.encode_images(self.vae, pixel_values)
            mean = LatentMoments(moments.mean)
            latents.append(self.family.latents_from_moments(mean, torch.Generator(), self.vae.config))
        return latents

    def _run_text(self, rows: Sequence[PromptRow], num_image_tokens: int) -> TextCache:
        factor = self.vae_scale_factor
        seen = [[PromptImage(x.shape[-2] * factor, x.shape[-1] * factor) for x in images] for _, images in rows]
        embeds = self.family.prompts.embeds([prompt for prompt, _ in rows], seen)
        tokens = collate_tokens(embeds, [images for _, images in rows], self.family.device)
        return self.transformer(None, None, tokens, num_image_tokens=num_image_tokens)

    def _denoise(
        self,
        latents: Tensor,
        text: TextCache,
        num_rows: int,
        num_inference_steps: int,
        scales: tuple[float, float],
        callback: Callable[..., dict[str, Tensor]] | None,
    ) -> Tensor:
        self.scheduler.set_timesteps(sigmas=np.linspace(1, 0, num_inference_steps + 1)[:-1], device=latents.device)
        self._num_timesteps = len(self.scheduler.timesteps)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for step, timestep in enumerate(self.scheduler.timesteps):
                inputs = latents.repeat(num_rows // len(latents), 1, 1, 1).to(self.family.dtype)
                # In float32, or the scheduler would hand back latents rounded to the denoiser's dtype.
                prediction = self.transformer(inputs, timestep.expand(num_rows), text).float()
                prediction = _guided(prediction, num_rows // len(latents), *scales)
                latents = self.scheduler.step(prediction, timestep, latents, return_dict=False)[0]
                if callback is not None:
                    latents = callback(self, step, timestep, {"latents": latents}).pop("latents", latents)
                progress_bar.update()
        return latents

    def save_pretrained(self, save_directory: Any, *arguments: Any, **kwargs: Any) -> None:
        """Write the whole model in diffusers' layout, tokenizer included; diffusers' own class loads it."""
        if self.tokenizer is None:
            from transformers import AutoTokenizer

            component = self.family.spec.component("tokenizer")
            files = [
                component_file(self.family.source, component, n) for n in (component.config_file, "tokenizer.json")
            ]
            self.register_modules(tokenizer=load_tokenizer(AutoTokenizer, files[0].parent))
        super().save_pretrained(save_directory, *arguments, **kwargs)


def build_pipeline(family: ModelFamily, denoiser: nn.Module, vae: nn.Module | None) -> OmniGenPipeline:
    """A pipeline on live weights, with the scheduler of the model folder.

    Raises:
        DataError: the folder's scheduler counts time from data to noise, which OmniGen does not.
    """
    component = family.spec.component("scheduler")
    path = component_file(family.source, component, component.config_file)
    config = read_object(path)
    if config.get("invert_sigmas") is not True or config.get("num_train_timesteps") != 1:
        raise DataError(
            Problem(
                "the model's scheduler does not count time as OmniGen does, from 0 on noise to 1 on data",
                key="pretrained_model_name_or_path",
                file=str(path),
                allowed='"invert_sigmas": true and "num_train_timesteps": 1',
                fix="take the scheduler folder of Shitao/OmniGen-v1-diffusers",
            )
        )
    return OmniGenPipeline(denoiser, FlowMatchEulerDiscreteScheduler.from_config(config), vae, None, family=family)


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode within, and afterwards exactly the mode that each submodule had."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _negative_prompts(negative_prompt: str | Sequence[str] | None, count: int) -> list[str]:
    if negative_prompt is None:
        negative_prompt = DEFAULT_NEGATIVE_PROMPT
    prompts = [negative_prompt] * count if isinstance(negative_prompt, str) else list(negative_prompt)
    if len(prompts) != count:
        raise ValueError(f"{len(prompts)} negative prompts for {count} prompts")
    return prompts


def _guidance_rows(rows: list[PromptRow], negative: list[str], guidance_scale: float) -> list[PromptRow]:
    """The rows that guidance compares: the prompts, the negative ones, and with input images these without a prompt.

    As diffusers' processor lays them out; a prompt without input images has the negative one in the third place too.
    """
    if guidance_scale == 1:
        return rows
    without: list[PromptRow] = [(prompt, []) for prompt in negative]
    if not any(images for _, images in rows):
        return rows + without
    alone = [
        (image_placeholders(len(images)), images) if images else other
        for (_, images), other in zip(rows, without, strict=True)
    ]
    return rows + without + alone


def _guided(prediction: Tensor, num_kinds: int, guidance_scale: float, img_guidance_scale: float) -> Tensor:
    """(B, C, h, w) from the predictions of `_guidance_rows`; diffusers' formula, `pipeline_omnigen.py`."""
    if num_kinds == 1:
        return prediction
    if num_kinds == 2:
        positive, negative = prediction.chunk(2)
        return negative + guidance_scale * (positive - negative)
    positive, negative, images = prediction.chunk(3)
    return negative + img_guidance_scale * (images - negative) + guidance_scale * (positive - images)


def _fitted(image: Image.Image) -> Image.Image:
    """An input image reduced to `MAX_REFERENCE_SIDE`, and cut to whole tokens from its middle."""
    image = image.convert("RGB")
    scale = min(1.0, MAX_REFERENCE_SIDE / max(image.size))
    scale = max(scale, PIXELS_PER_TOKEN / min(image.size))
    if scale != 1:
        width, height = (max(PIXELS_PER_TOKEN, round(side * scale)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    width, height = (side // PIXELS_PER_TOKEN * PIXELS_PER_TOKEN for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
